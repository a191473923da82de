// An answer on the page: its reasoning folded, its text as blocks of which only the last ones change, its speed.

import { element, parse } from "./markdown.js";
import { seconds } from "./stream.js";

// Returns a function that shows an answer in its view, at most once a frame until it is the last time.
// Plain is the text of a model that writes no Markdown.
export function drawer(view, isPlain) {
  const text = view.querySelector(".text");
  const speed = document.createElement("div");
  speed.className = "speed";
  view.append(speed);
  view.classList.add("waiting");
  let thinking = null;
  let shown = []; // the blocks that are on the page, as JSON
  let waiting = false;

  function show(growing, last) {
    const reach = atBottom();
    if (growing.reasoning) {
      thinking ??= foldedReasoning(view);
      const took = growing.thought ?? (last ? growing.last : null);
      thinking.title.textContent = took === null ? "Thinking…" : `Thought for ${seconds(took - growing.first)}`;
      thinking.text.textContent = growing.reasoning;
    }
    if (isPlain()) {
      text.classList.add("plain");
      text.textContent = growing.content;
    } else {
      shown = drawBlocks(text, parse(growing.content), shown);
    }
    speed.textContent = growing.speed();
    view.classList.toggle("waiting", !last);
    follow(reach);
  }

  return (growing, last = false) => {
    if (last) {
      show(growing, true);
    } else if (!waiting) {
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        if (view.classList.contains("waiting")) show(growing, false);
      });
    }
  };
}

// Replaces the blocks that changed, which are those at the end.
function drawBlocks(text, blocks, shown) {
  const wanted = blocks.map((block) => JSON.stringify(block));
  let same = 0;
  while (same < wanted.length && wanted[same] === shown[same]) same += 1;
  while (text.childNodes.length > same) text.lastChild.remove();
  text.append(...blocks.slice(same).map(element));
  return wanted;
}

function foldedReasoning(view) {
  const folded = document.createElement("details");
  folded.className = "reasoning";
  const title = document.createElement("summary");
  const text = document.createElement("div");
  folded.append(title, text);
  view.prepend(folded);
  return { title, text };
}

function atBottom() {
  const main = document.querySelector("main");
  return main.scrollHeight - main.scrollTop - main.clientHeight < 60;
}

// Scrolls to the end, if that is wanted.
export function follow(wanted) {
  const main = document.querySelector("main");
  if (wanted) main.scrollTop = main.scrollHeight;
}
