// The page: a history, a size, and the lists of that size and of the largest one side by side.
//
// What computes is LocalModel (model.js), or ApiModel (api_model.js), which asks a service:
// `recommend(history, k, size) -> {rows, scores, ms}`, `search(query, limit) -> rows`, `name(row)`; of a service, rows
// are ids. Titles come from users' data: they become text nodes, never markup.

import { ApiModel, ServiceError } from "./api_model.js?v=__EXPORT__";
import { DamagedExportError, LocalModel, compareLists, readModel, sha256 } from "./model.js?v=__EXPORT__";

const LIST_LENGTH = 10;
const FOUND_LENGTH = 8;
const GOOD_SHARE = 0.9; // of the largest size's quality: the smallest size that has it is shown first
const MOVE_MS = 220;

const byId = (id) => document.getElementById(id);
const EXPORT = document.querySelector('meta[name="export"]').content;

const state = { history: [], chosen: 0, asked: 0, found: [], active: -1 };
let manifest, model;

// Loading

async function fetchFile(name) {
  const response = await fetch(`${name}?v=${EXPORT}`);
  if (!response.ok) throw new DamagedExportError(`${name} cannot be loaded (${response.status})`);
  return response.arrayBuffer();
}

const parse = (bytes) => JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));

async function load() {
  manifest = parse(await fetchFile("model.json"));
  if (manifest.export !== EXPORT) {
    throw new DamagedExportError("its files are of two exports");
  }
  if (manifest.api) {
    model = new ApiModel(manifest.api);
    return;
  }
  const [weights, items] = await Promise.all([fetchFile("model.bin"), fetchFile("items.json")]);
  if ((await sha256(new Uint8Array(items))) !== manifest.items_sha256) {
    throw new DamagedExportError("items.json is not what its sha256 says");
  }
  const { ids, titles } = parse(items);
  const names = ids.map((id, row) => titles?.[row] || id);
  model = new LocalModel(await readModel(manifest, weights), names);
}

function fail(error) {
  const notice = byId("notice");
  notice.hidden = false;
  if (error instanceof ServiceError) {
    notice.textContent = `The service has not answered: ${error.message}.`;
    return;
  }
  const isDamaged = error instanceof DamagedExportError || error instanceof SyntaxError;
  notice.textContent = isDamaged
    ? `This export is damaged: ${error.message}. Reload the page; if this stays, copy the whole folder again.`
    : `The page cannot work: ${error.message}. Reload it with a connection.`;
  notice.classList.add("failed");
  byId("page").hidden = true;
}

// Words

const number = new Intl.NumberFormat("en");
const percent = (share) => `${Math.round(100 * share)} %`;
const plural = (count, word) => `${number.format(count)} ${word}${count === 1 ? "" : "s"}`;

function formatBytes(bytes) {
  return bytes < 999_500 ? `${Math.round(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(bytes < 9.95e6 ? 2 : 1)} MB`;
}

function formatMs(ms) {
  return `${ms < 1 ? ms.toPrecision(2) : ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

/** Bytes of the model and the item vectors of a size: sections of smaller sizes come first. */
function bytesOf(index) {
  return manifest.sections.slice(0, index + 1).reduce((sum, section) => sum + section.bytes, 0);
}

/** A figure of a size by its place, or undefined. */
function figure(metric, index) {
  return manifest.figures?.sizes[manifest.sizes[index]]?.[metric];
}

const formatFigure = (metric, value) => (metric.startsWith("recall") ? `${(100 * value).toFixed(1)} %` : value.toFixed(4));
const timeName = () => (manifest.api ? "Time of an answer, with the network" : "Time per event, here");
const metricName = (metric) => metric.replace("ndcg", "NDCG").replace("recall", "Recall");

// Elements

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const title = (row) => element("span", { className: "title", dir: "auto" }, model.name(row));
const hiddenText = (text) => element("span", { className: "visually-hidden" }, text);
const announce = (text) => (byId("announcement").textContent = text);

// History

function pick(row) {
  state.history.push(row);
  closeFound();
  refresh(`Added ${model.name(row)}.`);
}

async function remove(index) {
  const place = state.history.length - 1 - index; // in the list, which has the latest first
  const [row] = state.history.splice(index, 1);
  await refresh(`Removed ${model.name(row)}.`);
  const buttons = byId("picked").querySelectorAll("button");
  (buttons[Math.min(place, buttons.length - 1)] ?? byId("search")).focus();
}

async function clear() {
  state.history = [];
  await refresh("The history is empty.");
  byId("search").focus();
}

function showHistory() {
  const { history } = state;
  const entries = history.map((row, index) =>
    element(
      "li",
      {},
      element("span", { className: "number" }, String(index + 1)),
      title(row),
      element("button", { type: "button", onclick: () => remove(index), "aria-label": `Remove ${model.name(row)}` }, "×"),
    ),
  );
  byId("picked").replaceChildren(...entries.reverse());
  byId("clear").hidden = !history.length;
  const limit = manifest.max_length;
  byId("hint").textContent = !history.length
    ? "Nothing picked yet. Search, or pick a recommendation: these are for somebody new."
    : history.length > limit
      ? `The model reads the last ${plural(limit, "event")}.`
      : `${plural(history.length, "event")}, the latest first.`;
}

// Search

async function search() {
  const query = byId("search").value;
  const found = await model.search(query, FOUND_LENGTH);
  if (query !== byId("search").value || document.activeElement !== byId("search")) return; // too late
  state.found = found;
  state.active = -1;
  const options = state.found.map((row, index) =>
    element(
      "li",
      {
        id: `found-${index}`,
        role: "option",
        "aria-selected": "false",
        onpointerdown: (event) => event.preventDefault(), // the search keeps the focus
        onclick: () => pickFound(index),
      },
      title(row),
    ),
  );
  byId("found").replaceChildren(...options);
  byId("found").hidden = !options.length;
  byId("search").setAttribute("aria-expanded", String(options.length > 0));
  byId("search").removeAttribute("aria-activedescendant");
  if (query.trim()) announce(options.length ? `${plural(options.length, "item")} found.` : "Nothing found.");
}

function activate(index) {
  const options = byId("found").children;
  options[state.active]?.setAttribute("aria-selected", "false");
  state.active = (index + options.length) % options.length;
  options[state.active].setAttribute("aria-selected", "true");
  options[state.active].scrollIntoView({ block: "nearest" });
  byId("search").setAttribute("aria-activedescendant", `found-${state.active}`);
}

function closeFound() {
  state.found = [];
  state.active = -1;
  byId("found").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
  byId("search").removeAttribute("aria-activedescendant");
}

function pickFound(index) {
  const row = state.found[index];
  byId("search").value = "";
  pick(row);
}

function onSearchKey(event) {
  const { found, active } = state;
  if (event.key === "ArrowDown" && !found.length) search().catch(fail);
  else if (event.key === "ArrowDown" && found.length) activate(active + 1);
  else if (event.key === "ArrowUp" && found.length) activate(active < 0 ? found.length - 1 : active - 1);
  else if (event.key === "Enter" && found.length) pickFound(Math.max(active, 0));
  else if (event.key === "Escape" && found.length) closeFound();
  else return;
  event.preventDefault();
}

// Size

function choose(index) {
  state.chosen = index;
  refresh("");
}

function showSize() {
  const { chosen } = state;
  const slider = byId("size");
  slider.value = chosen;
  slider.setAttribute("aria-valuetext", `${manifest.sizes[chosen]} of ${manifest.sizes.at(-1)} channels`);
  for (const id of ["bars", "ticks"]) {
    [...byId(id).children].forEach((part, index) => part.classList.toggle("is-chosen", index === chosen));
  }
  [...byId("table-body").children].forEach((line, index) => {
    line.classList.toggle("is-chosen", index === chosen);
    if (index === chosen) line.setAttribute("aria-current", "true");
    else line.removeAttribute("aria-current");
  });
}

function showFigures(ms) {
  const { chosen } = state;
  const last = manifest.sizes.length - 1;
  const largest = manifest.sizes[last];
  const against = (text) => (chosen === last ? "the largest size" : text);
  const quality = manifest.figures
    ? manifest.figures.metrics.map((metric) => [
        `${metricName(metric)}, masked`,
        formatFigure(metric, figure(metric, chosen)),
        against(`${percent(figure(metric, chosen) / figure(metric, last))} of size ${largest}`),
      ])
    : [["Quality", "–", "not measured"]];
  const bytes = () => [
    ["Weights and vectors", formatBytes(bytesOf(chosen)), against(`${formatBytes(bytesOf(last))} at size ${largest}`)],
  ];
  const time = [timeName(), formatMs(ms.chosen), against(`${formatMs(ms.largest)} at size ${largest}`)];
  const tiles = manifest.api ? [time] : [...quality, ...bytes(), time];
  byId("figures").replaceChildren(
    ...tiles.map(([name, value, note]) =>
      element(
        "div",
        {},
        element("dt", {}, name),
        element("dd", { className: "value" }, value),
        element("dd", { className: "against" }, note),
      ),
    ),
  );
}

function buildSizes() {
  const { sizes, figures } = manifest;
  const metric = figures?.metrics[0];
  const most = metric ? Math.max(...sizes.map((_, index) => figure(metric, index))) : 0;
  const bar = (_, index) => {
    const made = element("span", { onclick: () => choose(index) }, figure(metric, index).toFixed(3));
    made.style.setProperty("--share", most ? figure(metric, index) / most : 0);
    return made;
  };
  byId("bars").replaceChildren(...(metric ? sizes.map(bar) : []));
  byId("bars").hidden = !metric;
  byId("ticks").replaceChildren(...sizes.map((size, index) => element("span", { onclick: () => choose(index) }, String(size))));
  byId("size").max = sizes.length - 1;
  byId("size").style.setProperty("--stops", sizes.length);
  byId("size").disabled = sizes.length === 1;
  byId("reference").hidden = sizes.length === 1;
  byId("sentence").textContent =
    `The model was trained once, with ${plural(sizes.at(-1), "channel")}. The slider cuts every weight to its first ` +
    "channels, and what remains is a whole model: a smaller one is lighter and faster, a larger one ranks better." +
    (metric ? ` The bars show ${metricName(metric)}.` : "");

  const metrics = figures?.metrics ?? [];
  const heads = ["Size", ...metrics.map(metricName), ...(manifest.api ? [] : ["Bytes"]), timeName()];
  byId("table-caption").textContent = "Quality, bytes and time of every size";
  byId("table-head").replaceChildren(element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name))));
  byId("table-body").replaceChildren(
    ...sizes.map((size, index) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, String(size)),
        ...metrics.map((name) => element("td", {}, formatFigure(name, figure(name, index)))),
        ...(manifest.api ? [] : [element("td", {}, formatBytes(bytesOf(index)))]),
        element("td", {}, "…"),
      ),
    ),
  );
}

function conditions() {
  const { api, figures, dtype, dtype_costs: costs } = manifest;
  const moved = costs === null ? "" : `, which moves NDCG@10 on validation by at most ${costs?.toFixed(4)}`;
  const stored = dtype === "float32" ? "" : ` Here it is stored as ${dtype}${moved}.`;
  const kept = api ? " Lists and times are a service's." : stored;
  if (!figures) return `Quality has not been measured.${kept}`;
  return (
    `Quality: ${figures.split} split, ${plural(figures.users, "user")}, masked (items already in a history do not ` +
    `count), of the float32 model.${kept}`
  );
}

/** The smallest size whose quality is nearly the largest one's. */
function firstChoice() {
  const last = manifest.sizes.length - 1;
  const metric = manifest.figures?.metrics[0];
  if (!metric) return last;
  return manifest.sizes.findIndex((_, index) => figure(metric, index) >= GOOD_SHARE * figure(metric, last));
}

// Lists

function badge(move) {
  if (move === null) return element("span", { className: "move only" }, "only here");
  const [way, sign] = move > 0 ? ["up", `▲ ${move}`] : move < 0 ? ["down", `▼ ${-move}`] : ["", "="];
  const words = way ? `${way} ${plural(Math.abs(move), "place")}` : "same place";
  return element(
    "span",
    { className: `move ${way}` },
    hiddenText(words),
    element("span", { "aria-hidden": "true" }, sign),
  );
}

/** An item of a list: its place, its title, how it moved. */
function listItem(row) {
  const properties = { type: "button", title: "Add to the history", onclick: () => pick(row) };
  const parts = [element("span", { className: "number" }), title(row), element("span")];
  const item = element("li", {}, element("button", properties, ...parts));
  item.dataset.row = row;
  return item;
}

/** Show a list; the focus stays at its place. */
function showList(list, rows, badges) {
  const known = new Map([...list.children].map((item) => [item.dataset.row, item]));
  const focused = [...list.children].findIndex((item) => item.contains(document.activeElement));
  const items = rows.map((row, place) => {
    const item = known.get(String(row)) ?? listItem(row);
    const [number, , move] = item.firstElementChild.children;
    number.textContent = place + 1;
    move.replaceWith(badges[place] ?? element("span"));
    return item;
  });
  list.replaceChildren(...items);
  if (focused >= 0) items[Math.min(focused, items.length - 1)]?.firstElementChild.focus();
}

/** Where the items of both lists are, above or below the beginning of their list. */
function listPositions() {
  return new Map([...document.querySelectorAll(".items li")].map((item) => [item, item.offsetTop - item.parentElement.offsetTop]));
}

/** Items that stayed move to their places, new ones appear. Measured with the frame, which lays out anyway. */
function moveItems(before) {
  if (!matchMedia("(prefers-reduced-motion: no-preference)").matches) return;
  requestAnimationFrame(() => {
    for (const [item, top] of listPositions()) {
      const was = before.get(item);
      if (was === top) continue;
      const from = was === undefined ? { opacity: 0 } : { transform: `translateY(${was - top}px)` };
      item.animate([from, { transform: "none", opacity: 1 }], { duration: MOVE_MS, easing: "ease-out" });
    }
  });
}

function showLists(chosen, largest) {
  const size = manifest.sizes[state.chosen];
  const last = manifest.sizes.at(-1);
  const isLargest = size === last;
  const difference = compareLists(chosen.rows, largest.rows);
  byId("chosen-title").textContent = `Recommended at size ${size}`;
  byId("largest-title").textContent = `At size ${last}, the largest`;
  const summary = isLargest
    ? "The largest size."
    : `${difference.common} of ${chosen.rows.length} also at size ${last}; ${difference.up} moved up, ${difference.down} down.`;
  byId("difference").textContent = summary;
  const missed = largest.rows.filter((row) => !chosen.rows.includes(row)).length;
  byId("missed").textContent = isLargest
    ? "The same list: choose a smaller size to compare."
    : missed
      ? `${missed} of ${largest.rows.length} not at size ${size}.`
      : `All of them are also at size ${size}.`;
  showList(byId("chosen"), chosen.rows, isLargest ? [] : difference.moves.map(badge));
  showList(
    byId("largest"),
    largest.rows,
    largest.rows.map((row) => (isLargest || chosen.rows.includes(row) ? null : badge(null))),
  );
  return summary;
}

/** Recommend and show everything anew; the announcement begins with `what` has been done. */
function refresh(what) {
  return recommend(what).catch(fail);
}

async function recommend(what) {
  const asked = ++state.asked;
  const { sizes } = manifest;
  const chosen = await model.recommend(state.history, LIST_LENGTH, sizes[state.chosen]);
  const largest =
    state.chosen === sizes.length - 1 ? chosen : await model.recommend(state.history, LIST_LENGTH, sizes.at(-1));
  if (asked !== state.asked) return; // somebody was faster
  byId("notice").hidden = true;
  const before = listPositions();
  showHistory();
  showSize();
  showFigures({ chosen: chosen.ms, largest: largest.ms });
  byId("table-body").children[state.chosen].lastElementChild.textContent = formatMs(chosen.ms);
  const summary = showLists(chosen, largest);
  moveItems(before);
  const first = chosen.rows.length ? `First recommendation at size ${sizes[state.chosen]}: ${model.name(chosen.rows[0])}.` : "";
  announce([what, first, summary].filter(Boolean).join(" "));
}

// Offline

const page = globalThis.trustedTypes?.createPolicy("page", {
  createScriptURL: (url) => {
    if (url !== "service-worker.js") throw new TypeError("not a script of this page");
    return url;
  },
}) ?? { createScriptURL: (url) => url };

async function keepOffline() {
  if (manifest.api) {
    byId("offline").textContent = "What you pick is sent to this service, and to nobody else.";
    return;
  }
  if (!("serviceWorker" in navigator)) {
    byId("offline").textContent += " It is kept for offline use only if it comes by https, or from this computer.";
    return;
  }
  const hadWorker = navigator.serviceWorker.controller !== null;
  navigator.serviceWorker.addEventListener("controllerchange", () => (byId("newer").hidden = !hadWorker));
  byId("reload").onclick = () => location.reload();
  await navigator.serviceWorker.register(page.createScriptURL("service-worker.js"));
  await navigator.serviceWorker.ready;
  byId("offline").textContent += " The page is saved and works without a network.";
}

/** What was saved may be what is damaged: the next time, everything comes from the server. */
async function forgetSaved() {
  const saved = await navigator.serviceWorker?.getRegistration();
  if (!saved) return;
  const names = (await caches.keys()).filter((name) => name.startsWith(`${saved.scope}#`));
  await Promise.all(names.map((name) => caches.delete(name)));
  await saved.unregister();
}

// Start

async function start() {
  await load();
  const { sizes } = manifest;
  state.chosen = firstChoice();
  const where = manifest.api ? "A service recommends." : "Recommendations are computed in this browser.";
  byId("about").textContent = `${manifest.name}: ${plural(manifest.num_items, "item")}. ${where}`;
  byId("conditions").textContent = conditions();
  byId("search").placeholder = "Type a word of a title";
  byId("search").addEventListener("input", () => search().catch(fail));
  byId("search").addEventListener("keydown", onSearchKey);
  byId("search").addEventListener("blur", closeFound);
  byId("clear").addEventListener("click", clear);
  byId("size").addEventListener("input", () => choose(Number(byId("size").value)));
  buildSizes();
  await model.warmUp(sizes.at(-1)); // the code is compiled: what follows is measured
  for (const [index, size] of sizes.entries()) {
    const { ms } = await model.warmUp(size);
    byId("table-body").children[index].lastElementChild.textContent = formatMs(ms);
  }
  await recommend("");
  byId("notice").hidden = true;
  byId("page").hidden = false;
  document.documentElement.dataset.ready = "";
}

start()
  .then(keepOffline, async (error) => {
    fail(error);
    await forgetSaved();
  })
  .catch((error) => console.warn(`not kept for offline use: ${error.message}`));
