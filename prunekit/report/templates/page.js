"use strict";

// Charts: a slider under each chart picks a removal; the pointer does the same on the chart itself.
for (const chart of document.querySelectorAll("[data-chart]")) {
  const pick = chart.querySelector("[data-pick]");
  const slider = pick.querySelector("input");
  const output = pick.querySelector("output");
  const area = chart.querySelector("[data-area]");
  const dots = new Map([...area.querySelectorAll(".dot")].map((dot) => [dot.dataset.step, dot]));
  const rows = chart.parentElement.querySelectorAll("[data-values]");
  const own = [...rows].find((table) => chart.compareDocumentPosition(table) & Node.DOCUMENT_POSITION_FOLLOWING);
  const values = [...own.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent));

  const show = () => {
    const [step, units, distance] = values[slider.value];
    const text = `${step}: ${units}, distance ${distance}`;
    output.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const [number, dot] of dots) dot.classList.toggle("on", number === slider.value);
  };
  const near = (event) => {
    const box = area.getBoundingClientRect();
    const part = (event.clientX - box.left) / box.width;
    slider.value = Math.round(part * slider.max);
    show();
  };
  area.addEventListener("pointermove", near);
  area.addEventListener("pointerdown", near);
  slider.addEventListener("input", show);
  pick.hidden = false;
  show();
}

for (const button of document.querySelectorAll("[data-copy]")) {
  const text = document.getElementById(button.dataset.copy);
  const status = button.parentElement.querySelector("[data-copied]");
  const label = button.textContent;
  let timer = 0;
  const say = (message) => {
    button.textContent = message;
    status.textContent = message;
    clearTimeout(timer);
    timer = setTimeout(() => {
      button.textContent = label;
      status.textContent = "";
    }, 2500);
  };
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      say("Copied");
    } catch {
      // Without permission the text is selected, so that the keyboard's copy takes it.
      getSelection().selectAllChildren(text);
      say("Selected: press Ctrl+C");
    }
  });
}

// On paper nothing can be unfolded.
const folded = [];
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    folded.push(details);
  }
});
addEventListener("afterprint", () => {
  for (const details of folded.splice(0)) details.open = false;
});
