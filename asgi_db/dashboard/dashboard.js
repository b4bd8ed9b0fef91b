"use strict";
// Follows the page that the server has made: each event holds the parts that have changed, as HTML.
(() => {
  const status = document.getElementById("status");
  const pause = document.getElementById("pause");
  const STRANGERS = 50; // After so many answers of other processes the page changes over to one.
  let source = null;
  let strangers = 0;

  function isPaused() {
    return pause.getAttribute("aria-pressed") === "true";
  }

  function say(text) {
    if (status.textContent !== text) status.textContent = text;
    status.dataset.state = text === "Live" ? "on" : "off";
  }

  function close() {
    if (source !== null) source.close();
    source = null;
  }

  function follow() {
    close();
    const address = new URL(location.href);
    address.hash = "";
    address.searchParams.set("process", document.body.dataset.process);
    const opened = (source = new EventSource(address));
    opened.addEventListener("parts", (event) => {
      strangers = 0;
      const parts = JSON.parse(event.data);
      for (const id of Object.keys(parts)) update(id, parts[id]);
      if (isPaused()) close();
      else say("Live");
    });
    opened.addEventListener("stranger", () => {
      strangers += 1;
      if (strangers >= STRANGERS) location.reload();
      else if (strangers > 3) say("Looking for the process");
    });
    opened.addEventListener("error", () => {
      // Every few seconds the server ends its answer, and the browser asks again by itself.
      setTimeout(() => {
        if (opened !== source || opened.readyState === EventSource.OPEN) return;
        say("No answer");
        if (opened.readyState === EventSource.CLOSED) setTimeout(() => opened === source && follow(), 3000);
      }, 2000);
    });
  }

  function update(id, html) {
    const place = document.getElementById(id);
    const wanted = place.cloneNode(false);
    wanted.innerHTML = html;
    morph(place, wanted);
  }

  // Makes one element like another one, and keeps each element that need not change: the focus,
  // the selection and what is folded out stay.
  function morph(old, wanted) {
    for (const name of old.getAttributeNames()) {
      if (name !== "open" && !wanted.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const name of wanted.getAttributeNames()) {
      const value = wanted.getAttribute(name);
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const keyed = new Map();
    const others = [];
    for (const child of old.childNodes) {
      const key = child.dataset?.key;
      if (key === undefined) others.push(child);
      else keyed.set(key, child);
    }
    const children = [];
    for (const child of wanted.childNodes) {
      const key = child.dataset?.key;
      const found = key === undefined ? others.shift() : keyed.get(key);
      if (found === undefined || found.nodeName !== child.nodeName) {
        children.push(child);
        continue;
      }
      children.push(found);
      if (child.nodeType === Node.ELEMENT_NODE) morph(found, child);
      else if (found.nodeValue !== child.nodeValue) found.nodeValue = child.nodeValue;
    }
    const kept = new Set(children);
    for (const child of [...old.childNodes]) if (!kept.has(child)) child.remove();
    let place = old.firstChild;
    for (const child of children) {
      if (child === place) place = place.nextSibling;
      else old.insertBefore(child, place);
    }
  }

  pause.hidden = false;
  pause.addEventListener("click", () => {
    const pauses = !isPaused();
    pause.setAttribute("aria-pressed", String(pauses));
    if (pauses) {
      close();
      say("Paused");
    } else follow();
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-view]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    history.pushState(null, "", link.href);
    follow();
  });
  addEventListener("popstate", follow);
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => event.persisted && !isPaused() && follow());
  follow();
})();
