"use strict";
// Whatever comes from the server or the user is set as text, never as markup.
const WORDS = {
  en: {
    language: "中文", theme: "Light or dark", key: "This server asks for an API key", enter: "Enter",
    search: "Search pictures", find: "Search", placeholder: "Describe a picture",
    chinesePlaceholder: "Describe a picture, in Chinese or English",
    examples: "Examples", pictureTitle: "Name a picture", drop: "Drop a picture here, paste one, or press to choose",
    classes: "Names to choose from, apart by commas", ownClasses: (n) => `the server's own ${n} names`,
    needClasses: "cat, dog, apple", release: "Let go to look at this picture", alike: "similar",
    found: (n, ms) => `${n} pictures in ${ms} ms`, similar: (n, ms) => `${n} similar pictures in ${ms} ms`,
    named: (n, ms) => `out of ${n} names, in ${ms} ms`, none: "Nothing found", working: "…",
    items: (n) => `${n} pictures indexed`, dims: (n) => `${n} dimensions`,
    noClasses: "Write some names above to choose from.", notPicture: "That is not a picture.",
    unreachable: "The server cannot be reached.", noPicture: "no picture",
    noIndex: "This server has no index; start it with --index to search pictures.",
    footer: "Everything stays on this server.",
  },
  zh: {
    language: "English", theme: "浅色或深色", key: "此服务需要 API 密钥", enter: "进入",
    search: "搜索图片", find: "搜索", placeholder: "描述一张图片",
    chinesePlaceholder: "用中文或英文描述一张图片",
    examples: "示例", pictureTitle: "识别图片", drop: "将图片拖到这里、粘贴，或点击选择",
    classes: "候选名称，用逗号分隔", ownClasses: (n) => `服务自带的 ${n} 个名称`,
    needClasses: "猫，狗，苹果", release: "松开以识别这张图片", alike: "相似",
    found: (n, ms) => `${n} 张图片，用时 ${ms} 毫秒`, similar: (n, ms) => `${n} 张相似图片，用时 ${ms} 毫秒`,
    named: (n, ms) => `共 ${n} 个名称，用时 ${ms} 毫秒`, none: "没有找到", working: "…",
    items: (n) => `已索引 ${n} 张图片`, dims: (n) => `${n} 维`,
    noClasses: "请先在上面写几个候选名称。", notPicture: "这不是图片。",
    unreachable: "无法连接服务。", noPicture: "无图片",
    noIndex: "此服务没有索引；用 --index 启动后即可搜索图片。",
    footer: "所有数据都留在此服务器上。",
  },
};
const EXAMPLES = ["a red apple", "a dog by the sea", "a yellow flower"];
const CHINESE_EXAMPLES = ["红苹果", "海边的狗", "夜空中的月亮", "a yellow flower", "木船"];
const SEPARATORS = /[,，、،;；؛\n]/;
const SHOWN = 24;
const LABELS = 6;
const PAUSE = 350; // milliseconds without a key until the text is searched
const LARGEST = 1600; // pixels of the longer side that is sent: the towers read a few hundred

const $ = (id) => document.getElementById(id);
const store = {
  get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* private windows have none */ } },
};
let tongue = store.get("trimtab-language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let key = "";
let model = null;
let picture = null; // data URI of the last picture
let asked = { search: null, classify: null };
let addresses = []; // of thumbnails, to be given back

const say = (name, ...values) => {
  const words = WORDS[tongue][name];
  return typeof words === "function" ? words(...values) : words;
};

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const told = new Map(); // what stands where, to be said again in the other language

function tell(place, words, ...values) {
  told.set(place, () => (words ? say(words, ...values) : ""));
  $(place).textContent = told.get(place)();
  $(place).classList.remove("bad");
}

function complain(place, text) {
  told.delete(place);
  $(place).textContent = text;
  $(place).classList.add("bad");
}

// The server

class Refusal extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

// Paths are relative: a proxy may have the server below a path of its own.
async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, say("unreachable"));
  }
  if (answer.ok) return answer;
  if (answer.status === 401) showKey();
  let message = `${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* not from this server */ }
  throw new Refusal(answer.status, message);
}

// A newer question of a kind makes the older one pointless.
function fresh(kind) {
  if (asked[kind]) asked[kind].abort();
  asked[kind] = new AbortController();
  return asked[kind].signal;
}

// Searching

async function search(body, words) {
  if (!model || !model.index) return;
  const signal = fresh("search");
  const section = $("results-section");
  section.setAttribute("aria-busy", "true");
  const begun = performance.now();
  try {
    const found = await (await ask("v1/search", { ...body, k: SHOWN }, signal)).json();
    showHits(found.data);
    const took = Math.round(performance.now() - begun);
    if (found.data.length) tell("status", words, found.data.length, took);
    else tell("status", "none");
  } catch (error) {
    if (error.name === "AbortError") return;
    showHits([]);
    complain("status", error.message);
  }
  section.setAttribute("aria-busy", "false");
}

function searchText() {
  const text = $("query").value.trim();
  history.replaceState(null, "", text ? `#q=${encodeURIComponent(text)}` : location.pathname);
  if (text) {
    search({ text }, "found");
  } else {
    if (asked.search) asked.search.abort();
    $("results-section").setAttribute("aria-busy", "false");
    showHits([]);
    tell("status", "");
  }
}

function showHits(hits) {
  addresses.forEach((address) => URL.revokeObjectURL(address));
  addresses = [];
  $("results").replaceChildren(...hits.map(hitCard));
}

function hitCard(hit) {
  const name = String(hit.metadata.text || hit.id);
  const card = make("li", "hit");
  const frame = make("button", "frame");
  frame.type = "button";
  frame.append(make("span", "none", say("working")), make("span", "alike", say("alike")));
  frame.setAttribute("aria-label", `${hit.rank}. ${name}, ${say("alike")}`);
  const words = make("div", "words");
  const bar = make("div", "bar");
  const level = make("i");
  level.style.setProperty("--share", Math.max(0, Math.min(1, hit.score)));
  bar.append(level);
  const label = make("p", "name", name);
  label.dir = "auto";
  label.title = name;
  words.append(label, bar, make("p", "score", hit.score.toFixed(3)));
  card.append(frame, words);
  if (model.index.pictures) showThumbnail(frame, hit.id, name);
  else frame.firstChild.textContent = say("noPicture");
  return card;
}

async function showThumbnail(frame, id, name) {
  try {
    const content = await (await ask(`v1/thumbnail?id=${encodeURIComponent(id)}`)).blob();
    const image = make("img");
    image.alt = name;
    image.src = URL.createObjectURL(content);
    addresses.push(image.src);
    frame.firstChild.replaceWith(image);
    frame.addEventListener("click", async () => look(await asDataUri(content), content));
  } catch {
    frame.firstChild.textContent = say("noPicture");
  }
}

// Looking at a picture

function asDataUri(content) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(content);
  });
}

// Photos of phones have many times the pixels that a tower reads; what the browser cannot decode is sent as it is.
async function prepared(file) {
  try {
    const image = await createImageBitmap(file);
    const scale = LARGEST / Math.max(image.width, image.height);
    if (scale >= 1) return await asDataUri(file);
    const canvas = make("canvas");
    canvas.width = Math.max(1, Math.round(image.width * scale));
    canvas.height = Math.max(1, Math.round(image.height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.92);
  } catch {
    return asDataUri(file);
  }
}

async function take(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    complain("label-status", say("notPicture"));
    return;
  }
  look(await prepared(file), file);
}

function look(uri, content) {
  picture = uri;
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(content);
  preview.hidden = false;
  $("drop-words").hidden = true;
  $("query").value = "";
  history.replaceState(null, "", location.pathname);
  answer();
}

function answer() {
  classify();
  search({ image: picture }, "similar");
}

async function classify() {
  if (!picture || !model) return; // without a model yet, `start` calls again
  const classes = $("classes").value.split(SEPARATORS).map((name) => name.trim().normalize()).filter(Boolean);
  if (!classes.length && !model.classes) {
    $("labels").replaceChildren();
    tell("label-status", "noClasses");
    return;
  }
  const body = { image: picture, top_k: LABELS };
  if (classes.length) body.classes = [...new Set(classes)];
  const begun = performance.now();
  try {
    const found = await (await ask("v1/classify", body, fresh("classify"))).json();
    $("labels").replaceChildren(...found.data[0].labels.map(labelRow));
    tell("label-status", "named", found.classes, Math.round(performance.now() - begun));
  } catch (error) {
    if (error.name === "AbortError") return;
    $("labels").replaceChildren();
    complain("label-status", error.message);
  }
}

function labelRow({ label, score }) {
  const row = make("li");
  const pair = make("div", "pair");
  const name = make("span", "", label);
  name.dir = "auto";
  pair.append(name, make("b", "", `${(100 * score).toFixed(1)}%`));
  const bar = make("div", "bar");
  const level = make("i");
  level.style.setProperty("--share", score);
  bar.append(level);
  row.append(pair, bar);
  return row;
}

// The page itself

const readsChinese = () => Boolean(model) && model.languages.some((tag) => /^zh(-|$)/.test(tag));

function translate() {
  document.documentElement.lang = tongue === "zh" ? "zh-CN" : "en";
  document.querySelectorAll("[data-say]").forEach((element) => { element.textContent = say(element.dataset.say); });
  document.querySelectorAll("[data-label]").forEach((element) => {
    element.setAttribute("aria-label", say(element.dataset.label));
    element.title = say(element.dataset.label);
  });
  told.forEach((text, place) => { $(place).textContent = text(); });
  $("language").textContent = say("language");
  $("query").placeholder = say(readsChinese() ? "chinesePlaceholder" : "placeholder");
  if (!model) return;
  $("classes").placeholder = model.classes ? say("ownClasses", model.classes) : say("needClasses");
  const facts = [say("dims", model.embedding_dim)];
  if (model.index) facts.unshift(say("items", model.index.items.toLocaleString()));
  $("facts").textContent = facts.join(" · ");
}

function showExamples() {
  $("examples").replaceChildren(...(readsChinese() ? CHINESE_EXAMPLES : EXAMPLES).map((text) => {
    const item = make("li");
    const button = make("button", "", text);
    button.type = "button";
    button.addEventListener("click", () => { $("query").value = text; searchText(); });
    item.append(button);
    return item;
  }));
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", String(dark));
}

function showKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

async function start() {
  try {
    [model] = (await (await ask("v1/models")).json()).data;
  } catch (error) {
    complain("status", error.message);
    return;
  }
  $("key-form").hidden = true;
  $("model").textContent = model.id;
  document.title = `Trimtab · ${model.id}`;
  $("search-form").hidden = !model.index;
  document.querySelector(".columns").classList.toggle("alone", !model.index);
  tell("status", model.index ? "" : "noIndex");
  translate();
  showExamples();
  if (picture) {
    answer();
    return;
  }
  const wanted = new URLSearchParams(location.hash.slice(1)).get("q");
  if (model.index && wanted) {
    $("query").value = wanted;
    searchText();
  } else if (model.index) {
    $("query").focus();
  }
}

let pause = 0;
let composing = false; // between the keys of an input method, the text is not yet what is meant
const soon = (work) => { clearTimeout(pause); pause = setTimeout(work, PAUSE); };

$("query").addEventListener("compositionstart", () => { composing = true; });
$("query").addEventListener("compositionend", () => { composing = false; soon(searchText); });
$("query").addEventListener("input", () => { if (!composing) soon(searchText); });
$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(pause);
  searchText();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  start();
});
$("classes").addEventListener("change", classify);
$("file").addEventListener("change", (event) => { take(event.target.files[0]); event.target.value = ""; });
$("drop").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); }
});
$("language").addEventListener("click", () => {
  tongue = tongue === "zh" ? "en" : "zh";
  store.set("trimtab-language", tongue);
  translate();
});
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  store.set("trimtab-theme", dark ? "dark" : "light");
  setTheme(dark);
});

let within = 0; // of nested elements, each tells when it is entered and left
const carriesFile = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragenter", (event) => {
  if (!carriesFile(event)) return;
  within += 1;
  $("veil").classList.add("shown");
});
document.addEventListener("dragleave", () => {
  within = Math.max(0, within - 1);
  if (!within) $("veil").classList.remove("shown");
});
document.addEventListener("dragover", (event) => { if (carriesFile(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!carriesFile(event)) return;
  event.preventDefault();
  within = 0;
  $("veil").classList.remove("shown");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) { event.preventDefault(); take(file); }
});
document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "TEXTAREA"].includes(document.activeElement.tagName);
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    $("query").focus();
    $("query").select();
  } else if (event.key === "Escape" && document.activeElement === $("query")) {
    $("query").value = "";
    searchText();
  } else if (event.key.startsWith("Arrow") && document.activeElement.classList.contains("frame")) {
    moveAmongHits(event);
  }
});

function moveAmongHits(event) {
  const frames = [...document.querySelectorAll(".frame")];
  const at = frames.indexOf(document.activeElement);
  const top = frames[0].getBoundingClientRect().top;
  const perLine = frames.filter((frame) => frame.getBoundingClientRect().top === top).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perLine, ArrowDown: perLine }[event.key];
  const next = frames[at + step];
  if (next) { event.preventDefault(); next.focus(); }
}

const preferred = matchMedia("(prefers-color-scheme: dark)");
const chosen = store.get("trimtab-theme");
setTheme(chosen ? chosen === "dark" : preferred.matches);
preferred.addEventListener("change", (event) => { if (!store.get("trimtab-theme")) setTheme(event.matches); });
translate();
start();
