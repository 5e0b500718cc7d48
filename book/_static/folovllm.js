/* The few things that the theme leaves to do. */
"use strict";

const isFile = location.protocol === "file:";
const root = document.documentElement;
if (root.dataset.mode === "auto") {
  // At once, not when the theme's script runs: else the page shows, and loads, the pictures of both themes.
  root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}
if (isFile) DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false; // a page opened as a file may not read other files

document.addEventListener("DOMContentLoaded", () => {
  sayWhatAFileCannot();
  keepFocus();
  breakNames();
});

/** Says on the search's page, and beside the download, what works from a server only. */
function sayWhatAFileCannot() {
  const results = document.getElementById("search-results");
  if (isFile && results) {
    const note = document.createElement("p");
    note.className = "only-file";
    note.textContent = "Opened as a file, this page finds the same pages, but cannot show what they say around your words.";
    results.before(note);
  }
  for (const link of document.querySelectorAll(".btn-download-source-button")) {
    if (isFile) link.closest("li").remove(); // a browser would show the file's text; how to run it stands below
    link.removeAttribute("target");
    link.setAttribute("download", "");
  }
}

/** Gives the focus back to the button that opened a menu, when Escape closes it. */
function keepFocus() {
  for (const [dialogId, buttonClass] of [
    ["pst-primary-sidebar-modal", ".primary-toggle"],
    ["pst-secondary-sidebar-modal", ".secondary-toggle"],
  ]) {
    const dialog = document.getElementById(dialogId);
    const button = document.querySelector(buttonClass);
    dialog?.addEventListener("close", () => setTimeout(() => button?.focus()));
  }
}

/** Characters of a name that there is room for on any screen. */
const SHORT = 16;
/** Those of a flag that is kept in one line; the longest here fits beside a word. */
const LONGEST_FLAG = 28;

/** Lets a long name break after a dot, a slash or an underscore, instead of anywhere, and a flag nowhere. */
function breakNames() {
  const places = [":is(td, th) code", ".cell_output > p > code:only-child", "summary code"];
  for (const name of document.querySelectorAll(places.map((place) => `.bd-article ${place} .pre`).join())) {
    if (name.textContent.length > SHORT) {
      name.innerHTML = name.innerHTML.replace(/[./](?=\w)|(?<=[a-z0-9])_(?=[a-z0-9])/gi, "$&<wbr>");
    }
  }
  // A browser breaks after any hyphen, so that nobody could tell whether "--" and "rate" belong together.
  for (const name of document.querySelectorAll(".bd-article code .pre")) {
    if (/^[\w-]*-[\w-]*$/.test(name.textContent) && name.textContent.length <= LONGEST_FLAG) name.style.whiteSpace = "nowrap";
  }
}
