// Formulas are set by MathJax, which docs/hooks.py copies from a package into the site.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  svg: { fontCache: "global", scale: 0.92 },
  options: { enableMenu: false, ignoreHtmlClass: ".*", processHtmlClass: "arithmatex" },
};
