// The chat page: a conversation with the server that it comes from. It is kept in this tab and nowhere else; the
// settings, the key among them, live as long as the tab (sessionStorage).

import { Answer, ServerError, errorMessage, events } from "./stream.js";
import { drawer, follow } from "./view.js";

const at = (id) => document.getElementById(id);
const settings = at("settings");
const fields = settings.elements;
const now = () => performance.now() / 1000;

let turns = []; // {role: "user" | "assistant", content, view: its <li>}
let models = {}; // by id, as /v1/models lists them
let running = null; // the AbortController of the answer that is being written

// ---- the server

function headers() {
  const key = fields.key.value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.text();
  const error = new ServerError(errorMessage(response.status, body));
  error.status = response.status;
  error.body = body;
  throw error;
}

async function loadModels() {
  try {
    const { data } = await (await checked(await fetch("v1/models", { headers: headers() }))).json();
    models = Object.fromEntries(data.map((model) => [model.id, model]));
    const chosen = fields.model.value || saved().model;
    fields.model.replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    hideError();
  } catch (error) {
    showError(error);
  }
  describeModel();
}

// False for a model that continues texts and does not chat: it has no template.
const chats = () => models[fields.model.value]?.chat !== false;

function describeModel() {
  const name = fields.model.value;
  at("title").textContent = document.title = name || "Chat";
  settings.querySelector(".chat-only").hidden = !chats();
  at("notice").textContent =
    name && !chats() ? "This model has no chat template: it continues your text, and all that stands above it." : "";
}

// Returns the path and the body of a request for what follows the turns `said`.
function request(said) {
  const usage = { include_usage: true, continuous_usage_stats: true };
  const body = { model: fields.model.value, stream: true, stream_options: usage };
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if (fields[name].value !== "") body[name] = Number(fields[name].value);
  }
  if (!chats()) {
    const positions = models[fields.model.value]?.max_model_len ?? 1024;
    const most = Math.min(256, Math.ceil(positions / 4)); // the server's own default is 16
    return ["v1/completions", { max_tokens: most, ...body, prompt: said.map(({ content }) => content).join("") }];
  }
  const content = fields.system.value.trim();
  const system = content ? [{ role: "system", content }] : [];
  return ["v1/chat/completions", { ...body, messages: [...system, ...said] }];
}

async function open(said, signal) {
  const [path, body] = request(said);
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  try {
    return await checked(response);
  } catch (error) {
    const model = models[fields.model.value];
    if (!chats() || !model || !/no_chat_template/.test(error.body)) throw error;
    model.chat = false; // the server has not said so before
    describeModel();
    return open(said, signal);
  }
}

// ---- the conversation

async function answer() {
  hideError();
  running = new AbortController();
  const said = turns.map(({ role, content }) => ({ role, content }));
  const turn = addTurn("assistant", "");
  const draw = drawer(turn.view, () => !chats());
  const growing = new Answer(now());
  showState();
  try {
    const response = await open(said, running.signal);
    let ended = false;
    for await (const data of events(response.body)) {
      ended = growing.take(data, now()) || ended;
      draw(growing);
    }
    if (!ended) throw new ServerError("The connection ended before the answer did.");
    if (growing.finish === "error") throw new ServerError("The server could not finish this answer.");
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  }
  running = null;
  turn.content = growing.content;
  draw(growing, true);
  if (!growing.content && !growing.reasoning) remove(turn);
  showState();
  at("prompt").focus();
}

function send() {
  const content = at("prompt").value;
  if (running || !content.trim()) return;
  at("prompt").value = "";
  addTurn("user", content);
  answer();
}

function regenerate() {
  if (running || !turns.length) return;
  if (turns.at(-1).role === "assistant") remove(turns.at(-1));
  answer();
}

function newChat() {
  running?.abort();
  turns = [];
  at("messages").replaceChildren();
  hideError();
  showState();
  at("prompt").focus();
}

function addTurn(role, content) {
  const view = document.createElement("li");
  view.className = role;
  view.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const text = document.createElement("div");
  text.className = "text";
  text.textContent = content;
  view.append(text);
  at("messages").append(view);
  const turn = { role, content, view };
  turns.push(turn);
  follow(true);
  return turn;
}

function remove(turn) {
  turn.view.remove();
  turns = turns.filter((other) => other !== turn);
}

// ---- the page around it

function showError(error) {
  const reached = error instanceof ServerError;
  at("error").textContent = reached ? error.message : `The server cannot be reached: ${error.message}`;
  at("error").hidden = false;
  if (error.status === 401) {
    showSettings(true);
    fields.key.focus();
  }
  follow(true);
}

function hideError() {
  at("error").hidden = true;
}

function showState() {
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  at("again").disabled = running !== null || !turns.length;
}

function showSettings(open) {
  settings.hidden = !open;
  at("show-settings").setAttribute("aria-expanded", String(open));
}

function saved() {
  return JSON.parse(sessionStorage.getItem("settings") ?? "{}");
}

function saveSettings() {
  sessionStorage.setItem("settings", JSON.stringify(Object.fromEntries(new FormData(settings))));
}

function applyTheme() {
  document.documentElement.dataset.theme = fields.theme.value;
}

for (const [name, value] of Object.entries(saved())) {
  if (name !== "model") fields[name].value = value;
}
applyTheme();

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
at("stop").addEventListener("click", () => running?.abort());
at("again").addEventListener("click", regenerate);
at("new-chat").addEventListener("click", newChat);
at("show-settings").addEventListener("click", () => showSettings(settings.hidden));
settings.addEventListener("submit", (event) => event.preventDefault());
settings.addEventListener("input", saveSettings);
settings.addEventListener("change", (event) => {
  saveSettings();
  applyTheme();
  if (event.target.name === "key") loadModels();
  if (event.target.name === "model") describeModel();
});

loadModels();
