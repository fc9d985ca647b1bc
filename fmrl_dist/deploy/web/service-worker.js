// Keeps one export whole: its files come from one cache, or none of them does. A new export has a new cache.

const EXPORT = "__EXPORT__";
const FILES = {}; // name → sha256
const PREFIX = `${self.registration.scope}#`;
const CACHE = PREFIX + EXPORT;

/** Only the page itself has the same address in every export. */
const address = (name) => new URL(name === "index.html" ? name : `${name}?v=${EXPORT}`, self.registration.scope).href;

async function fetchWhole(name) {
  for (const cache of ["default", "reload"]) {
    const response = await fetch(address(name), { cache });
    if (!response.ok) throw new Error(`${name}: ${response.status}`);
    const bytes = await response.arrayBuffer();
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    // A new response, as one that was redirected may not answer a navigation.
    if (found === FILES[name]) return new Response(bytes, { headers: { "Content-Type": mediaType(response) } });
  }
  throw new Error(`${name} is of another export`);
}

const mediaType = (response) => response.headers.get("Content-Type") ?? "application/octet-stream";

async function keep() {
  const names = Object.keys(FILES);
  const responses = await Promise.all(names.map(fetchWhole));
  const cache = await caches.open(CACHE);
  await Promise.all(names.map((name, i) => cache.put(address(name), responses[i])));
  await self.skipWaiting();
}

async function forgetOthers() {
  const others = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== CACHE);
  await Promise.all(others.map((name) => caches.delete(name)));
}

async function answer(request) {
  const cache = await caches.open(CACHE);
  const { origin, pathname } = new URL(request.url);
  const isPage = request.mode === "navigate" && [self.registration.scope, address("index.html")].includes(origin + pathname);
  return (await cache.match(isPage ? address("index.html") : request)) ?? fetch(request);
}

self.addEventListener("install", (event) => event.waitUntil(keep()));
self.addEventListener("activate", (event) => event.waitUntil(forgetOthers()));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && event.request.url.startsWith(self.registration.scope)) {
    event.respondWith(answer(event.request));
  }
});
