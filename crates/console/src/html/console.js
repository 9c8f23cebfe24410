// What makes pages live: parts that have changed are put in place, and some keys lead to pages. Everything works without it.
"use strict";

(() => {
  const live = document.querySelector("[data-live]");
  const stateOf = document.querySelector("[data-live-state]");
  let source = null;
  let pausedBy = "";

  const say = (text) => { if (stateOf) stateOf.textContent = text; };

  // Nothing changes under somebody who reads, writes or has chosen something.
  const busy = () => {
    const at = document.activeElement;
    const writes = at && /^(INPUT|SELECT|TEXTAREA)$/.test(at.tagName);
    return document.hidden || writes || String(document.getSelection()) !== "" || document.querySelector("details[open]");
  };

  const put = (id, html) => {
    const old = document.getElementById(id);
    if (!old) return;
    const parsed = new DOMParser().parseFromString(html, "text/html").body.firstElementChild;
    if (!parsed || parsed.outerHTML === old.outerHTML) return;
    const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    old.replaceWith(parsed);
    if (focused) {
      const again = [...parsed.querySelectorAll("a")].find((link) => link.getAttribute("href") === focused);
      if (again) again.focus();
    }
  };

  const close = () => { if (source) { source.close(); source = null; } };

  const open = () => {
    if (!live || source || pausedBy) return;
    source = new EventSource(live.dataset.live);
    source.addEventListener("part", (event) => {
      if (busy()) { say("live, waits while you read"); return; }
      const part = JSON.parse(event.data);
      put(part.id, part.html);
      say("live");
    });
    source.onerror = () => say("not connected, trying again");
    source.onopen = () => say("live");
  };

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) close(); else open();
  });
  window.addEventListener("pagehide", close);
  window.addEventListener("pageshow", open);
  open();

  // Keys: / to the search, r to pause or go on, g and a letter to a page. Never while somebody writes.
  const pages = { o: "/", e: "/events", d: "/dead", p: "/parked", a: "/audit", r: "/reconcile", j: "/jobs" };
  let afterG = false;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (afterG) {
      afterG = false;
      const link = document.querySelector(`nav a[href$="${pages[event.key]}"]`);
      if (pages[event.key] && link) link.click();
      return;
    }
    if (event.key === "g") afterG = true;
    if (event.key === "/") {
      const search = document.querySelector("[data-search]");
      if (search) { event.preventDefault(); search.focus(); }
    }
    if (event.key === "r" && live) {
      pausedBy = pausedBy ? "" : "you";
      if (pausedBy) { close(); say("paused; r goes on"); } else { open(); }
    }
  });
})();
