// The model behind a service of fmrl_dist.serve: what LocalModel does, asked over its API. Items go by their ids.

export class ServiceError extends Error {}

export class ApiModel {
  /** `root` is the address below which /v1 is. */
  constructor(root) {
    this.root = root;
    this.titles = new Map(); // id → title
  }

  name(id) {
    return this.titles.get(id) ?? String(id);
  }

  async search(query, limit) {
    if (!query.trim()) return [];
    const { items } = await this.ask(`v1/items?${new URLSearchParams({ query, limit })}`);
    return this.note(items);
  }

  /** The k best ids after a history of ids, without those in it; ms is from the question to the answer. */
  async recommend(history, k, size) {
    const started = performance.now();
    const { recommendations } = await this.ask("v1/recommend", { histories: [history], k, size });
    const ms = performance.now() - started;
    return { rows: this.note(recommendations[0]), scores: recommendations[0].map(({ score }) => score), ms };
  }

  async warmUp(size) {
    return this.recommend([], 10, size);
  }

  note(items) {
    for (const { item_id: id, title } of items) if (title?.trim()) this.titles.set(id, title);
    return items.map(({ item_id: id }) => id);
  }

  async ask(path, body) {
    const request = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    let response;
    try {
      response = await fetch(this.root + path, request);
    } catch {
      throw new ServiceError("it cannot be reached");
    }
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new ServiceError(answer.error ?? `status ${response.status}`);
    return answer;
  }
}
