"""The table of families, and the classes that it names."""

from __future__ import annotations

import pytest
import transformers

from prunekit.core.errors import PlanError
from prunekit.modeling import modeling_prunekit
from prunekit.modeling.families import (
    hetero_classes,
    hetero_config_class,
    hetero_config_fields,
    hetero_families,
    hetero_model_type,
)
from tests.tiny import FAMILIES, TWO_STACKS


def test_table_is_that_of_the_modeling_file() -> None:
    assert hetero_families() == tuple(modeling_prunekit.CLASSES)
    for family in hetero_families():
        assert (hetero_config_class(family), *hetero_classes(family)) == modeling_prunekit.class_names(family)


@pytest.mark.parametrize("name", ["PrunekitLlama", "PrunekitLlamaForAnything", "Llama", "__path__"])
def test_modeling_file_has_no_other_class(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(modeling_prunekit, name)


@pytest.mark.parametrize("family", hetero_families())
def test_classes_agree_with_the_table(family: str) -> None:
    config = getattr(modeling_prunekit, hetero_config_class(family))
    assert config.model_type == hetero_model_type(family)
    for name, auto in hetero_classes(family).items():
        cls = getattr(modeling_prunekit, name)
        assert (cls.__name__, cls.__module__) == (name, modeling_prunekit.__name__)
        assert cls is getattr(modeling_prunekit, name)
        assert getattr(transformers, auto)._model_mapping[config] is cls
        assert cls.config_class is config
        assert cls._auto_class == auto


def test_every_tiny_family_has_classes() -> None:
    assert {*FAMILIES, *TWO_STACKS} == set(hetero_families())


def test_fields_of_a_language_model() -> None:
    assert hetero_config_fields("gpt2", ["GPT2LMHeadModel"]) == {
        "model_type": "prunekit_gpt2",
        "architectures": ["PrunekitGPT2LMHeadModel"],
        "auto_map": {
            "AutoConfig": "modeling_prunekit.PrunekitGPT2Config",
            "AutoModel": "modeling_prunekit.PrunekitGPT2Model",
            "AutoModelForCausalLM": "modeling_prunekit.PrunekitGPT2LMHeadModel",
        },
    }


@pytest.mark.parametrize("architectures", [None, [], ["BertModel"]])
def test_base_model_is_the_default(architectures: list[str] | None) -> None:
    fields = hetero_config_fields("bert", architectures)
    assert fields["architectures"] == ["PrunekitBertModel"]
    assert list(fields["auto_map"]) == ["AutoConfig", "AutoModel"]


def test_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="`mamba` has no class") as caught:
        hetero_config_fields("mamba", ["MambaForCausalLM"])
    assert "llama" in caught.value.hint


def test_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="`BertForMultipleChoice` has no class") as caught:
        hetero_config_fields("bert", ["BertForMultipleChoice"])
    assert "BertForMaskedLM" in caught.value.hint
