// What the theme leaves out for keyboards and screen readers. It adds parts after the page has loaded, so they are watched.
function mend() {
  document.querySelectorAll("input[aria-hidden='true']").forEach((input) => { input.tabIndex = -1; });
  document.querySelectorAll(".md-code__nav:not([aria-label])").forEach((nav) => {
    nav.setAttribute("aria-label", `Code block ${document.querySelectorAll(".md-code__nav[aria-label]").length + 1}`);
  });
  document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset table").forEach((frame) => {
    if (frame.scrollWidth > frame.clientWidth) { frame.tabIndex = 0; }
  });
  document.querySelectorAll("[role=dialog]:not([aria-label])").forEach((box) => { box.setAttribute("aria-label", "Search"); });
  document.querySelectorAll("th").forEach((head) => {
    if (!head.textContent.trim()) { head.replaceWith(document.createElement("td")); }
  });
}
mend();
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
