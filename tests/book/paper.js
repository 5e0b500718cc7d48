// What is wrong with a page on paper, and what of it is open; the page is shown as print already.
(() => {
  const article = document.querySelector("article");
  const find = (selectors, root = article) => [...root.querySelectorAll(selectors)];
  const begin = (element) => element.textContent.trim().slice(0, 60);

  const isDark = (color) => color.match(/[\d.]+/g).slice(0, 3).every((part) => Number(part) <= 60);
  const texts = find("p, li, pre, pre span, h2, td, summary, figcaption, a, code").filter((text) => text.checkVisibility());

  const content = (details) => [...details.children].find((child) => child.tagName !== "SUMMARY");
  const isOpen = (details) => content(details).checkVisibility() && content(details).getBoundingClientRect().height > 0;
  const isSolution = (details) => details.classList.contains("hide");
  const details = find("details");
  const toOpen = details.filter((one) => one.closest(".cell_output, #in-an-interview") && !isSolution(one));

  const figures = find("figure");
  return {
    cut: find("pre").filter((pre) => pre.scrollWidth > pre.clientWidth + 1).map(begin),
    pale: texts.filter((text) => !isDark(getComputedStyle(text).color)).map((text) => text.outerHTML.slice(0, 90)),
    closed: toOpen.filter((one) => !isOpen(one)).map(begin),
    open: details.filter((one) => !toOpen.includes(one) && isOpen(one)).map(begin),
    solutions: details.filter(isSolution).length,
    dark: find("figure img.only-dark").filter((img) => img.checkVisibility()).length,
    tall: figures
      .filter((figure) => figure.getBoundingClientRect().height > 950 || getComputedStyle(figure).breakInside !== "avoid")
      .map((figure) => figure.id),
  };
})();
