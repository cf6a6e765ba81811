(function () {
  "use strict";
  var root = document.documentElement, button = document.getElementById("theme"), key = "rlhf-report-theme";
  function stored() {
    try { return localStorage.getItem(key); } catch (error) { return null; }
  }
  function dark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function show() { button.textContent = dark() ? "light" : "dark"; }
  if (stored() === "light" || stored() === "dark") { root.dataset.theme = stored(); }
  button.hidden = false;
  show();
  button.addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem(key, root.dataset.theme); } catch (error) { /* the choice lasts as long as the page */ }
    show();
  });
  // A link to a folded section opens it, and printing opens them all.
  function unfold() {
    var target = location.hash ? document.getElementById(location.hash.slice(1)) : null;
    if (target && target.tagName === "DETAILS") { target.open = true; }
  }
  addEventListener("hashchange", unfold);
  unfold();
  var closed = [];
  addEventListener("beforeprint", function () {
    closed = Array.prototype.slice.call(document.querySelectorAll("details:not([open])"));
    closed.forEach(function (one) { one.open = true; });
  });
  addEventListener("afterprint", function () {
    closed.forEach(function (one) { one.open = false; });
  });
})();
