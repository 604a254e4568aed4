"""What every page that prunekit writes must pass in a browser, as scripts that list what is wrong."""

# Text with less contrast than WCAG AA asks for, by computed styles; backgrounds with alpha are laid over each other.
CONTRAST = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (c) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = c.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const bad = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    if (!element.checkVisibility() || element.closest(".hidden, .skip")) continue;
    seen += 1;
    const back = behind(element), fore = over(parse(style.color), back);
    const [a, b] = [light(back), light(fore)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (contrast < (large ? 3 : 4.5)) bad.push([element.className, walker.currentNode.textContent, contrast]);
  }
  return {bad, seen};
}"""

# What axe would say first: pictures, controls and regions without a name, headings that jump, ids that repeat.
BASICS = """() => {
  const bad = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const named = (e) => e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.getAttribute("alt");
  const shown = (e) => !e.closest("[aria-hidden=true]");
  for (const e of all("svg, img")) if (shown(e) && !named(e)) bad.push(["no name", e.outerHTML]);
  for (const e of all("input")) if (!e.labels.length) bad.push(["no label", e.outerHTML]);
  for (const e of all("button, a, summary")) if (!e.textContent.trim()) bad.push(["empty", e.outerHTML]);
  for (const e of all("[role=region], nav, main section")) if (!named(e)) bad.push(["no name", e.outerHTML]);
  for (const e of all("a[href^='#']")) if (!document.querySelector(e.hash)) bad.push(["leads nowhere", e.hash]);
  for (const e of all("table")) if (!e.querySelector("th[scope]")) bad.push(["no heads", e.outerHTML.slice(0, 80)]);
  const levels = all("h1, h2, h3, h4").map((h) => Number(h.tagName[1]));
  levels.forEach((level, i) => { if (level > (levels[i - 1] ?? 0) + 1) bad.push(["heading jumps", i]); });
  const ids = all("[id]").map((e) => e.id);
  if (new Set(ids).size !== ids.length) bad.push(["id repeats", ids.join()]);
  for (const e of all("nav a, button, summary, input")) {
    const least = e.tagName === "INPUT" ? 16 : 24;
    if (e.checkVisibility() && e.getBoundingClientRect().height < least) bad.push(["small", e.outerHTML]);
  }
  for (const [selector, wanted] of [["h1", 1], ["header", 1], ["nav", 1], ["main", 1], ["footer", 1]]) {
    if (all(selector).length !== wanted) bad.push([selector, all(selector).length]);
  }
  if (document.documentElement.lang !== "en" || !document.title) bad.push(["lang or title"]);
  return bad;
}"""
