// Small comforts; every page works without them.
(() => {
  // "/" goes to the search field.
  document.addEventListener("keydown", (e) => {
    if (e.key !== "/" || e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) return;
    const q = document.getElementById("q");
    if (q) { e.preventDefault(); q.focus(); q.select(); }
  });
  // Lists stay current while somebody looks at them and types nothing.
  const live = document.querySelector("[data-live]");
  if (live) setInterval(async () => {
    if (document.hidden || document.querySelector("input:focus")) return;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, redirect: "error" });
      if (!answer.ok) return;
      const next = new DOMParser().parseFromString(await answer.text(), "text/html");
      const main = next.getElementById("main");
      if (main) document.getElementById("main").replaceChildren(...main.childNodes);
      const nav = next.querySelector("header nav");
      if (nav) document.querySelector("header nav").replaceWith(nav);
    } catch { /* away for a moment */ }
  }, 5000);
})();
