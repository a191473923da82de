// What comes from the server while it answers: server-sent events, and what they add up to. Knows nothing of the page.

export class ServerError extends Error {}

// Turns pieces of a stream of server-sent events, cut anywhere, into the texts of their `data` fields.
export class EventParser {
  #rest = "";
  #data = [];

  push(piece) {
    const lines = (this.#rest + piece).split("\n");
    this.#rest = lines.pop();
    const found = [];
    for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
      if (line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      } else if (line === "" && this.#data.length) {
        found.push(this.#data.join("\n"));
        this.#data = [];
      } // anything else is a comment (a heartbeat) or a field that is not used
    }
    return found;
  }
}

// Yields the `data` of each event of a response's body.
export async function* events(body) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield* parser.push(decoder.decode(value, { stream: true }));
  }
}

// What an error's body says, in one line; JSON as OpenAI's servers write it, or anything else.
export function errorMessage(status, body) {
  try {
    const { error, detail } = JSON.parse(body);
    const message = error?.message ?? error ?? detail;
    if (typeof message === "string" && message) return message;
  } catch {
    // not JSON
  }
  return `The server answered ${status}. ${body.slice(0, 200)}`.trim();
}

// An answer as it grows. Times are in seconds, of any clock.
export class Answer {
  content = "";
  reasoning = "";
  finish = null;
  usage = null;
  chunks = 0;
  first = null; // when the first text came
  last = null;
  thought = null; // when the first text behind the reasoning came

  constructor(started) {
    this.started = started;
  }

  // Takes the data of one event; returns true if it was the last.
  take(data, now) {
    if (data === "[DONE]") return true;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(errorMessage(500, data));
    this.usage = event.usage ?? this.usage;
    for (const choice of event.choices ?? []) {
      const reasoning = choice.delta?.reasoning_content ?? "";
      const content = choice.delta?.content ?? choice.text ?? "";
      if (reasoning || content) {
        this.chunks += 1;
        this.first ??= now;
        this.last = now;
        if (content && this.reasoning) this.thought ??= now;
      }
      this.reasoning += reasoning;
      this.content += content;
      this.finish = choice.finish_reason ?? this.finish;
    }
    return false;
  }

  // How fast it is: what is known of it so far, in words.
  speed() {
    const words = [];
    const tokens = this.usage?.completion_tokens ?? this.chunks;
    if (tokens) words.push(`${this.usage ? "" : "about "}${tokens} ${tokens === 1 ? "token" : "tokens"}`);
    if (this.first !== null) words.push(`first after ${seconds(this.first - this.started)}`);
    if (this.last > this.first && tokens > 1) {
      words.push(`${((tokens - 1) / (this.last - this.first)).toFixed(1)} tokens/s`);
    }
    const drafts = this.usage?.completion_tokens_details;
    const accepted = drafts?.accepted_prediction_tokens ?? 0;
    const drafted = accepted + (drafts?.rejected_prediction_tokens ?? 0);
    if (drafted) words.push(`${Math.round((100 * accepted) / drafted)} % of ${drafted} drafts accepted`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) words.push(`${cached} of ${this.usage.prompt_tokens} prompt tokens cached`);
    if (this.finish === "length") words.push("cut at the most tokens");
    return words.join(" · ");
  }
}

export function seconds(value) {
  return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
}
