// The page of `gpt2ml serve`. Everything that comes from the model or from a link is shown with
// textContent: whatever a model writes, it is text.
"use strict";

const EXAMPLES = ["今天天气不错", "双十一", "科学空间"];
const DEFAULTS = { temperature: 1, top_k: 5, top_p: 1, max_tokens: 128, n: 2, stop: "", seed: "" };
const WORDS = {
  en: {
    skip: "Skip to the prompt", prompt: "Prompt", model: "Model", settings: "Settings", temperature: "Temperature",
    promptHint: "The model goes on from here. Ctrl+Enter writes, Escape cancels.",
    examples: "Examples", topK: "Top-k (0: all)", topP: "Top-p", length: "Length, tokens",
    samples: "Samples", stop: "Stop at", seed: "Seed (empty: random)", key: "API key",
    write: "Write", cancel: "Cancel", link: "Copy link", texts: "Texts", copy: "Copy",
    goOn: "Go on", other: "中文", writing: "Writing …", done: "Done.", cancelled: "Cancelled.",
    copied: "Copied.", linkCopied: "A link with these settings was copied.",
    empty: "Write or choose a prompt first.", lost: "The connection was lost.",
    fromHere: "The prompt now ends at the chosen token.", sample: (number) => `Sample ${number}`,
    keyNeeded: "This server asks for an API key (under Settings).",
    keyWrong: "The server knows no such API key.",
    full: "The server is busy; try again in a moment.", ending: "The server is shutting down.",
    speed: (rate) => `${rate} tokens/s`,
    tokenHint: "Point at a token for its probabilities; click it, or press Enter, to go on from there.",
  },
  zh: {
    skip: "跳到提示", prompt: "提示", model: "模型", settings: "设置", temperature: "温度",
    promptHint: "模型从这里续写。Ctrl+Enter 开始，Esc 取消。",
    examples: "例子", topK: "Top-k（0：全部）", topP: "Top-p", length: "长度（词）",
    samples: "篇数", stop: "停在", seed: "种子（留空：随机）", key: "API 密钥",
    write: "续写", cancel: "取消", link: "复制链接", texts: "文本", copy: "复制",
    goOn: "接着写", other: "English", writing: "正在写……", done: "写完了。", cancelled: "已取消。",
    copied: "已复制。", linkCopied: "带有这些设置的链接已复制。",
    empty: "请先写一个提示，或选一个例子。", lost: "连接中断。",
    fromHere: "提示已截到所选的词。", sample: (number) => `第 ${number} 篇`,
    keyNeeded: "此服务器需要 API 密钥（在“设置”里填写）。",
    keyWrong: "服务器不认识这个 API 密钥。",
    full: "服务器正忙，请稍后再试。", ending: "服务器正在关闭。",
    speed: (rate) => `每秒 ${rate} 个词`,
    tokenHint: "指向一个词可看它的概率；点击或按回车，从那里续写。",
  },
};

const element = (id) => document.getElementById(id);
const field = (name) => element(name);
let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
let running = null; // the AbortController of the request under way
let models = []; // the model, and its adapters
let wantedModel = null; // in the link
let said = ""; // the status, a name in WORDS or a text of the server's
let rate = null; // tokens a second

function create(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const word = (name) => Object.hasOwn(WORDS[language], name) ? WORDS[language][name] : name;

function say(nameOrText, isError = false) {
  said = nameOrText;
  const status = element("status");
  status.textContent = word(said);
  status.classList.toggle("error", isError);
}

function showRate() {
  element("speed").textContent = rate === null ? "" : WORDS[language].speed(rate.toFixed(1));
}

// -- language ------------------------------------------------------------------------------------

function speak() {
  const words = WORDS[language];
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) {
    node.textContent = words[node.dataset.text];
  }
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", words[node.dataset.label]);
  }
  for (const node of document.querySelectorAll("[data-sample]")) {
    node.setAttribute("aria-label", words.sample(node.dataset.sample));
  }
  element("status").textContent = word(said);
  showRate();
  element("language").textContent = words.other;
  element("language").lang = language === "zh" ? "en" : "zh-CN";
}

// -- settings and the link that holds them --------------------------------------------------------

function showValues() {
  for (const output of document.querySelectorAll("output")) {
    output.textContent = field(output.htmlFor.value).value;
  }
}

function readLink() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    field(name).value = values.has(name) ? values.get(name) : standard;
  }
  element("prompt").value = values.has("prompt") ? values.get("prompt") : EXAMPLES[0];
  if (Object.hasOwn(WORDS, values.get("language"))) language = values.get("language");
  wantedModel = values.get("model");
  showModels();
  showValues();
}

function writeLink() {
  const values = new URLSearchParams({ prompt: element("prompt").value, language });
  if (models.length > 1) values.set("model", element("choice").value);
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    if (field(name).value !== String(standard)) values.set(name, field(name).value);
  }
  return `${location.origin}${location.pathname}#${values}`;
}

async function copy(text, name) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no secure context: the old way
    const area = create("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(name);
}

// -- requests ------------------------------------------------------------------------------------

function headers() {
  const key = element("key").value;
  const given = { "Content-Type": "application/json" };
  if (key) given.Authorization = `Bearer ${key}`;
  return given;
}

function request() {
  const number = (name) => Number(field(name).value);
  const body = {
    prompt: element("prompt").value, stream: true, logprobs: 5, n: number("n"),
    max_tokens: number("max_tokens"), temperature: number("temperature"),
    top_k: number("top_k"), top_p: number("top_p"),
  };
  if (models.length) body.model = element("choice").value;
  if (field("stop").value) body.stop = [field("stop").value];
  if (field("seed").value) body.seed = number("seed");
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function failure(response) {
  const names = { 429: "full", 503: "ending" };
  if (response.status in names) return names[response.status];
  if (response.status === 401) {
    showKey();
    return element("key").value ? "keyWrong" : "keyNeeded";
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function write() {
  if (running) return;
  const body = request();
  if (!body.prompt.trim()) return say("empty", true);
  const cards = newCards(body);
  running = new AbortController();
  setBusy(true);
  say("writing");
  rate = null;
  showRate();
  const speed = { began: performance.now(), tokens: 0 };
  try {
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) show(cards[choice.index], choice, speed);
    }
    say("done");
  } catch (error) {
    if (error.name === "AbortError") say("cancelled");
    else say(error instanceof TypeError ? "lost" : error.message, true);
  } finally {
    running = null;
    setBusy(false);
    for (const card of cards) end(card);
  }
}

const submit = () => element("form").requestSubmit(); // which checks the fields

function setBusy(busy) {
  const [on, off] = busy ? ["cancel", "write"] : ["write", "cancel"];
  const focused = document.activeElement === element(off); // a disabled button loses the focus
  element(on).disabled = false;
  if (focused) element(on).focus();
  element(off).disabled = true;
}

// -- the texts -----------------------------------------------------------------------------------

function newCards(body) {
  const texts = element("texts");
  texts.replaceChildren();
  element("probabilities").replaceChildren(named("div", "tokenHint"));
  const cards = Array.from({ length: body.n }, (_, index) => {
    const article = create("article", "writing");
    article.dataset.sample = index + 1;
    article.setAttribute("aria-busy", "true");
    const paragraph = create("p", "body");
    paragraph.lang = "zh-CN";
    paragraph.append(create("span", "given", body.prompt));
    const card = { article, paragraph, prompt: body.prompt };
    const row = create("div", "row");
    const copyButton = named("button", "copy");
    copyButton.type = "button";
    copyButton.addEventListener("click", () => copy(paragraph.textContent, "copied"));
    const goOn = named("button", "goOn");
    goOn.type = "button";
    goOn.addEventListener("click", () => {
      if (running) return;
      setPrompt(paragraph.textContent);
      submit();
    });
    row.append(copyButton, goOn);
    article.append(paragraph, row);
    texts.append(article);
    return card;
  });
  speak();
  return cards;
}

function named(tag, name) {
  const made = create(tag);
  made.dataset.text = name;
  return made;
}

function end(card) {
  card.article.classList.remove("writing");
  card.article.removeAttribute("aria-busy");
}

function show(card, choice, speed) {
  const tokens = choice.logprobs ? choice.logprobs.tokens.length : 0;
  speed.tokens += tokens;
  const seconds = (performance.now() - speed.began) / 1000;
  if (seconds > 0.5) {
    rate = speed.tokens / seconds;
    showRate();
  }
  if (choice.text) card.paragraph.append(token(card, choice));
  if (choice.finish_reason) end(card);
}

function token(card, choice) {
  const span = create("span", "token", choice.text);
  span.setAttribute("role", "button");
  span.setAttribute("aria-describedby", "probabilities");
  span.tabIndex = card.paragraph.querySelector(".token") ? -1 : 0; // one tab stop for each text
  const showIt = () => showProbabilities(choice);
  span.addEventListener("mouseenter", showIt);
  span.addEventListener("focus", showIt);
  span.addEventListener("click", () => endAt(card, span));
  span.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) endAt(card, span);
    const next = event.key === "ArrowRight" ? span.nextElementSibling
      : event.key === "ArrowLeft" ? span.previousElementSibling : null;
    if (next && next.classList.contains("token")) {
      span.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      event.preventDefault();
    }
  });
  return span;
}

function endAt(card, span) {
  let text = "";
  for (const node of card.paragraph.children) {
    text += node.textContent;
    if (node === span) break;
  }
  setPrompt(text);
  say("fromHere");
}

function setPrompt(text) {
  const prompt = element("prompt");
  prompt.value = text;
  prompt.focus();
  prompt.setSelectionRange(text.length, text.length);
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}

function showProbabilities(choice) {
  if (!choice.logprobs) return;
  const lines = choice.logprobs.tokens.map((name, index) => {
    const others = Object.entries(choice.logprobs.top_logprobs[index] || {})
      .sort((first, second) => second[1] - first[1])
      .map(([other, logprob]) => `${other} ${percent(logprob)}`).join("  ");
    return `${name} ${percent(choice.logprobs.token_logprobs[index])}  |  ${others}`;
  });
  const panel = element("probabilities");
  panel.replaceChildren(...lines.map((line) => create("div", "", line)));
}

// -- start ---------------------------------------------------------------------------------------

function showKey() {
  for (const node of document.querySelectorAll(".key")) node.hidden = false;
  element("settings").open = true;
}

async function showModel() {
  const response = await fetch("v1/models", { headers: headers() }).catch(() => null);
  if (response && response.status === 401) return showKey();
  if (!response || !response.ok) return;
  models = (await response.json()).data.map((model) => model.id);
  element("model").textContent = models[0];
  showModels();
}

function showModels() {
  const options = models.map((name) => create("option", "", name));
  for (const option of options) option.selected = option.textContent === wantedModel;
  element("choice").replaceChildren(...options);
  for (const node of document.querySelectorAll(".choice")) node.hidden = models.length < 2;
}

function start() {
  readLink();
  speak();
  for (const text of EXAMPLES) {
    const button = create("button", "", text);
    button.type = "button";
    button.lang = "zh-CN";
    button.addEventListener("click", () => setPrompt(text));
    element("examples").append(button);
  }
  element("settings").open = matchMedia("(min-width: 36rem)").matches;
  element("form").addEventListener("input", showValues);
  element("form").addEventListener("submit", (event) => { event.preventDefault(); write(); });
  element("cancel").addEventListener("click", () => running && running.abort());
  element("form").addEventListener("invalid", () => { element("settings").open = true; }, true);
  element("link").addEventListener("click", () => copy(writeLink(), "linkCopied"));
  element("key").addEventListener("change", showModel);
  element("language").addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    speak();
  });
  addEventListener("hashchange", () => { readLink(); speak(); });
  addEventListener("keydown", (event) => {
    if (event.isComposing) return; // these keys are the input method's
    if (event.key === "Escape" && running) running.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  });
  showModel();
}

start();
