// Texts whose contrast with their background is below 4.5 (3 for large ones), as WCAG 2 computes it, as JSON.
(() => {
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
    const unit = color.startsWith("color(") ? 1 : 255;
    return [r / unit, g / unit, b / unit, a];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [1, 1, 1, 1]);
  };
  const boxUnder = (text) => {
    const { x, y, width, height } = text.getBoundingClientRect();
    const isUnder = (box) => {
      const { left, right, top, bottom } = box.getBoundingClientRect();
      return left <= x + width / 2 && right >= x + width / 2 && top <= y + height / 2 && bottom >= y + height / 2;
    };
    const filled = [...text.closest("svg").querySelectorAll("rect")].filter((box) => getComputedStyle(box).fill !== "none");
    return filled.filter(isUnder).reduce((below, box) => over(parse(getComputedStyle(box).fill), below), background(text.closest("svg")));
  };
  const opacity = (element) => {
    let product = 1;
    for (let e = element; e; e = e.parentElement) product *= Number(getComputedStyle(e).opacity);
    return product;
  };

  document.querySelectorAll("details").forEach((details) => (details.open = true));
  document.getAnimations().forEach((animation) => animation.finish()); // what was folded fades in
  const found = new Map();
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    const style = getComputedStyle(element);
    const drawn = element.closest("svg") !== null; // the words of a drawing
    const ground = drawn ? boxUnder(element) : background(element);
    const [r, g, b, a] = parse(drawn ? style.fill : style.color);
    const [light, dark] = [luminance(over([r, g, b, a * opacity(element)], ground)), luminance(ground)].sort((x, y) => y - x);
    const contrast = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (contrast < (large ? 3 : 4.5)) {
      const where = `${element.tagName.toLowerCase()}.${element.className}`;
      found.set(where + contrast, `${where} has a contrast of ${contrast.toFixed(2)}: ${text.slice(0, 40)}`);
    }
  }
  return JSON.stringify([...found.values()]);
})();
