// The Markdown that language models write: to plain data (`parse`), and from it to elements (`element`). A text never
// becomes HTML: every part of it ends in a text node. Time grows with the length of the text and no faster.

const FENCE = /^ *(`{3,}|~{3,}) *([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_LINE = /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;
const LINK = /https?:\/\/[^\s<>"`]*[^\s<>"`.,;:!?'*_)\]]/y;
const DEEPEST = 4; // quotes in quotes, emphasis in emphasis

// Returns the blocks of a text: objects with a `kind`.
export function parse(text, depth = 0) {
  const lines = text.split("\n");
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    let found;
    if (!line.trim()) {
      i += 1;
    } else if ((found = FENCE.exec(line))) {
      const [, fence, language] = found;
      const end = after(lines, i + 1, (l) => l.trim().startsWith(fence) && !l.trim().replaceAll(fence[0], ""));
      blocks.push({ kind: "code", language: language.trim(), text: lines.slice(i + 1, end).join("\n") });
      i = end + 1;
    } else if ((found = HEADING.exec(line))) {
      blocks.push({ kind: "heading", level: found[1].length, inline: inline(found[2].replace(/ #+ *$/, "")) });
      i += 1;
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule" });
      i += 1;
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      const end = after(lines, i, (l) => !QUOTE.test(l));
      const inner = lines.slice(i, end).map((l) => QUOTE.exec(l)[1]);
      blocks.push({ kind: "quote", blocks: parse(inner.join("\n"), depth + 1) });
      i = end;
    } else if (ITEM.test(line)) {
      const end = after(lines, i, (l) => !l.trim() || FENCE.test(l) || (begins(l) && !ITEM.test(l)));
      blocks.push({ kind: "list", items: items(lines.slice(i, end)) });
      i = end;
    } else if (line.includes("|") && TABLE_LINE.test(lines[i + 1] ?? "")) {
      const end = after(lines, i + 2, (l) => !l.includes("|"));
      blocks.push({ kind: "table", rows: [line, ...lines.slice(i + 2, end)].map(cells) });
      i = end;
    } else {
      const end = after(lines, i + 1, (l) => !l.trim() || begins(l));
      blocks.push({ kind: "paragraph", inline: inline(lines.slice(i, end).join("\n")) });
      i = end;
    }
  }
  return blocks;
}

function begins(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function after(lines, start, ends) {
  let i = start;
  while (i < lines.length && !ends(lines[i])) i += 1;
  return i;
}

function items(lines) {
  const found = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item) {
      const marker = /\d/.test(item[2]) ? item[2] : "•";
      found.push({ depth: Math.min(3, Math.floor(item[1].length / 2)), marker, lines: [item[3]] });
    } else {
      found.at(-1).lines.push(line.trim());
    }
  }
  return found.map(({ depth, marker, lines }) => ({ depth, marker, inline: inline(lines.join("\n")) }));
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
}

// Returns the parts of a line: objects with a `kind`, "text" among them.
function inline(text, depth = 0) {
  const parts = [];
  const known = new Map(); // where a mark is found next, -1 where it does not come any more
  let plain = 0; // where the text begins that has no part yet

  const find = (mark, from) => {
    const last = known.get(mark);
    if (last !== undefined && (last < 0 || last >= from)) return last;
    known.set(mark, text.indexOf(mark, from));
    return known.get(mark);
  };
  const add = (start, end, part) => {
    if (start > plain) parts.push({ kind: "text", text: text.slice(plain, start) });
    if (part) parts.push(part);
    plain = end;
    return end;
  };

  for (let i = 0; i < text.length; ) {
    const character = text[i];
    if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      add(i, i + 1);
      i += 2;
    } else if (character === "`") {
      const mark = /`+/y;
      mark.lastIndex = i;
      const ticks = mark.exec(text)[0];
      const end = find(ticks, i + ticks.length);
      const code = { kind: "code", text: text.slice(i + ticks.length, end) };
      i = end < 0 ? i + ticks.length : add(i, end + ticks.length, code);
    } else if ((character === "*" || character === "_") && depth < DEEPEST) {
      const mark = text[i + 1] === character ? character + character : character;
      const start = i + mark.length;
      const end = emphasised(text, i, mark, find(mark, start + 1));
      const kind = mark.length === 2 ? "strong" : "emphasis";
      i = end < 0 ? start : add(i, end + mark.length, { kind, inline: inline(text.slice(start, end), depth + 1) });
    } else if (character === "[") {
      const middle = find("](", i + 1);
      const end = middle < 0 ? -1 : find(")", middle);
      const innermost = end >= 0 && !text.slice(i + 1, middle).includes("[");
      const address = innermost ? text.slice(middle + 2, end) : "";
      const good = /^(https?:\/\/|mailto:)\S+$/.test(address);
      i = good ? add(i, end + 1, { kind: "link", address, text: text.slice(i + 1, middle) }) : i + 1;
    } else if (character === "h") {
      LINK.lastIndex = i;
      const address = LINK.exec(text)?.[0];
      i = address ? add(i, i + address.length, { kind: "link", address, text: address }) : i + 1;
    } else {
      i += 1;
    }
  }
  add(text.length, text.length);
  return parts;
}

// Returns `end` where the marks at `start` and `end` make an emphasis of what is between them, else -1.
function emphasised(text, start, mark, end) {
  if (end < 0 || /\s/.test(text[start + mark.length]) || /\s/.test(text[end - 1])) return -1;
  if (mark[0] === "_" && (/\w/.test(text[start - 1] ?? "") || /\w/.test(text[end + mark.length] ?? ""))) return -1;
  return end;
}

// Returns the element of a block.
export function element(block) {
  switch (block.kind) {
    case "code":
      return make("pre", [make("code", [block.text])]);
    case "heading":
      return make(block.level < 3 ? "h2" : "h3", block.inline.map(node));
    case "rule":
      return make("hr", []);
    case "quote":
      return make("blockquote", block.blocks.map(element));
    case "list":
      return make("ul", block.items.map(listItem));
    case "table":
      return table(block.rows);
    default:
      return make("p", block.inline.map(node));
  }
}

function listItem({ depth, marker, inline }) {
  const item = make("li", inline.map(node));
  item.dataset.depth = depth;
  item.dataset.marker = marker;
  return item;
}

function table([head, ...rows]) {
  const row = (tag, parts) => make("tr", parts.map((cell) => make(tag, cell.map(node))));
  const frame = make("div", [make("table", [row("th", head), ...rows.map((parts) => row("td", parts))])]);
  frame.className = "table";
  return frame;
}

function node(part) {
  if (part.kind === "text") return document.createTextNode(part.text);
  if (part.kind === "code") return make("code", [part.text]);
  if (part.kind === "strong") return make("strong", part.inline.map(node));
  if (part.kind === "emphasis") return make("em", part.inline.map(node));
  const link = make("a", [part.text]);
  link.href = part.address; // begins with http:, https: or mailto:
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

function make(tag, children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}
