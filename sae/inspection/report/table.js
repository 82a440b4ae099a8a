/* The table of all latents: sorted, filtered and searched in memory; only rows in sight are in the page. */

const ROW = 38; // height of a row in pixels, as in the style sheet
const BEYOND = 12; // rows kept above and below those in sight

const START = { q: "", sort: "latent", down: false, show: "all", min: "", above: false };

class LatentTable {
  constructor(data, root, open) {
    Object.assign(this, { data, root, open, c: data.columns, n: data.columns.latent?.length ?? 0 });
    this.lower = tokens.map((_, i) => bare(i).toLowerCase());
    this.state = { ...START };
    this.rows = new Map();
    this.top = 0;
    this.active = 0;
    this.build();
    this.apply();
  }

  get columns() {
    const { c } = this;
    const first = (name) => (i) => (c[name][i].length ? this.lower[c[name][i][0]] : null);
    const tokenOr = (name) => (i) => (c[name][i].length ? token(c[name][i][0]) : "–");
    const alive = (name, show) => (i) => (c.firings[i] ? show(c[name][i]) : "–");
    const fired = (name) => (i) => (c.firings[i] ? c[name][i] : null);
    const all = [
      ["latent", "Latent", 70, (i) => c.latent[i], (i) => h("a", { href: `#latent/${c.latent[i]}`, tabindex: -1 }, String(c.latent[i])), "Number of the latent"],
      ["density", "Density", 84, fired("density"), alive("density", percent), "Share of rows on which it fired"],
      ["largest", "Max", 66, fired("largest"), alive("largest", figure), "Largest activation"],
      ["clarity", "Clarity", 154, fired("clarity"), (i) => this.clarity(i), "1 = one token, 0 = any; the tick and the small number: 95th percentile of random directions"],
      ["effective_tokens", "Eff. tokens", 92, fired("effective_tokens"), alive("effective_tokens", figure), "Kinds of token it fires on, as many equally frequent ones would count"],
      ["fires_on", "Fires on", 116, first("fires_on"), (i) => (c.firings[i] ? tokenOr("fires_on")(i) : h("span", { class: "pill" }, "dead")), "Most telling token at its firings"],
      ["share", "Share", 74, (i) => c.share[i], (i) => percent(c.share[i]), "Share of its activation that falls on that token"],
      ["lift", "Lift", 150, (i) => c.lift[i], (i) => this.lift(i), "Share over the token's share of the rows, with its 95 % interval"],
      ["before", "Right before", 112, first("before"), tokenOr("before"), "Most telling token one position before"],
      ["before_lift", "Lift", 66, (i) => c.before_lift[i], (i) => times(c.before_lift[i]), "Lift of that token"],
      ["raises", "Raises", 112, first("raises"), tokenOr("raises"), "Top output token by the logit lens"],
      ["cosine", "Cosine", 112, (i) => c.cosine[i], (i) => [figure(c.cosine[i]), this.null(c.null_cosine[i])], "Cosine with that token's unembedding; small: 95th percentile of random directions"],
    ].map(([key, label, width, value, cell, title]) => ({ key, label, width, value, cell, title }));
    const lists = { before: "before", before_lift: "before", raises: "raises", cosine: "raises" };
    return all.filter(({ key }) => !(key in lists) || (c[lists[key]] ?? []).some((list) => list.length));
  }

  null(value) {
    return value === null ? "" : h("small", { class: "null" }, ` / ${figure(value)}`);
  }

  clarity(i) {
    const { c } = this;
    if (!c.firings[i]) return "–";
    const bar = h("span", { class: "meter" }, h("i"), c.null_clarity[i] === null ? "" : h("b"));
    bar.style.setProperty("--value", Math.max(0, c.clarity[i] ?? 0));
    bar.style.setProperty("--null", c.null_clarity[i] ?? 0);
    return [bar, figure(c.clarity[i]), this.null(c.null_clarity[i])];
  }

  lift(i) {
    const { c } = this;
    if (c.lift[i] === null) return "–";
    const interval = c.lift_low[i] === null ? "" : ` [${ratio(c.lift_low[i])}–${ratio(c.lift_high[i])}]`;
    return [times(c.lift[i]), h("small", { class: "null" }, interval)];
  }

  /** Clearer than random directions, by enough firings to say so. */
  isClear(i) {
    const { c } = this;
    return c.firings[i] >= this.data.enough_firings && c.null_clarity[i] !== null && c.clarity[i] > c.null_clarity[i];
  }

  build() {
    this.shown = this.columns;
    this.byKey = new Map(this.shown.map((column) => [column.key, column]));
    this.heads = this.shown.map((column) => {
      const button = h("button", { type: "button", "data-sort": column.key, title: column.title }, column.label);
      button.addEventListener("click", () => this.sortBy(column.key));
      return h("th", { scope: "col", class: `c-${column.key}` }, button);
    });
    const widths = this.shown.map(({ width }) => h("col", { style: `width:${width}px` }));
    this.above = h("tr", { "aria-hidden": "true", class: "spacer" }, h("td", { colspan: this.shown.length }));
    this.below = this.above.cloneNode(true);
    this.body = h("tbody", {}, this.above, this.below);
    const table = h("table", { class: "latents", "aria-label": "All latents" }, h("colgroup", {}, widths), h("thead", {}, h("tr", {}, this.heads)), this.body);
    table.style.minWidth = `${this.shown.reduce((sum, { width }) => sum + width, 0)}px`;
    this.table = table;
    this.nothing = h("p", { class: "nothing", hidden: true }, "No latent matches.");
    this.root.replaceChildren(table, this.nothing);
    this.root.addEventListener("scroll", () => {
      if (this.root.offsetParent) this.top = this.root.scrollTop;
      this.render();
    });
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-latent]");
      if (row && !event.ctrlKey && !event.metaKey && !event.shiftKey && !String(getSelection())) {
        this.activate(Number(row.dataset.at));
        this.open(row.dataset.latent);
      }
    });
    this.body.addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("resize", () => this.render());
  }

  sortBy(key) {
    const { sort, down } = this.state;
    this.set({ sort: key, down: key === sort ? !down : !["latent", "fires_on", "before", "raises", "effective_tokens"].includes(key) });
  }

  set(changes) {
    Object.assign(this.state, changes);
    this.top = 0;
    this.active = 0;
    this.apply();
    this.changed?.();
  }

  /** Which rows match, in which order. */
  apply() {
    const { c, state } = this;
    const column = this.byKey.get(state.sort) ?? this.shown[0];
    const matches = this.matcher(state.q);
    const least = Number(state.min) / 100 || 0;
    const order = [];
    for (let i = 0; i < this.n; i++) {
      if (state.show !== "all" && (state.show === "dead") !== !c.firings[i]) continue;
      if (c.density[i] < least || (state.above && !this.isClear(i)) || !matches(i)) continue;
      order.push(i);
    }
    const keys = Array.from({ length: this.n });
    for (const i of order) keys[i] = column.value(i);
    const sign = state.down ? -1 : 1;
    order.sort((a, b) => {
      const [x, y] = [keys[a], keys[b]];
      if (x === y) return a - b;
      if (x === null) return 1;
      if (y === null) return -1;
      return x < y ? -sign : sign;
    });
    this.order = order;
    this.clear();
    this.heads.forEach((head, at) => {
      if (this.shown[at] === column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    this.table.setAttribute("aria-rowcount", order.length + 1);
    this.nothing.hidden = order.length > 0;
    this.render();
    this.root.scrollTop = this.top;
    this.render();
  }

  matcher(query) {
    const text = query.trim();
    if (!text) return () => true;
    const { c, lower } = this;
    let fits = (i) => lower[i].includes(text.toLowerCase());
    if (text.startsWith('"')) {
      const closed = text.length > 1 && text.endsWith('"');
      fits = closed ? (i) => tokens[i] === text : (i) => tokens[i].startsWith(text);
    } else if (query.startsWith(" ")) {
      fits = (i) => bare(i) === query;
    }
    const found = Uint8Array.from(tokens, (_, i) => fits(i));
    return (i) =>
      String(c.latent[i]) === text || [c.fires_on[i], c.before[i], c.raises[i]].some((list) => list.some((t) => found[t]));
  }

  clear() {
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
  }

  render() {
    const { order, root } = this;
    const first = Math.max(0, Math.floor(root.scrollTop / ROW) - BEYOND);
    const last = Math.min(order.length, Math.ceil((root.scrollTop + root.clientHeight) / ROW) + BEYOND);
    for (const [at, row] of this.rows) {
      if (at < first || at >= last) {
        row.remove();
        this.rows.delete(at);
      }
    }
    if (this.active < first || this.active >= last) {
      this.activate(Math.min(first + BEYOND, last - 1));
    }
    let next = this.above.nextSibling;
    for (let at = first; at < last; at++) {
      if (this.rows.has(at)) next = this.rows.get(at).nextSibling;
      else {
        const row = this.row(at);
        this.rows.set(at, row);
        this.body.insertBefore(row, next);
      }
    }
    this.above.firstChild.style.height = `${first * ROW}px`;
    this.below.firstChild.style.height = `${Math.max(0, order.length - last) * ROW}px`;
  }

  row(at) {
    const i = this.order[at];
    const cells = this.shown.map(({ key, cell }) => h("td", { class: `c-${key}` }, cell(i)));
    const attributes = { "data-latent": this.c.latent[i], "data-at": at, "aria-rowindex": at + 2, tabindex: at === this.active ? 0 : -1 };
    return h("tr", { ...attributes, class: this.c.firings[i] ? null : "dead" }, cells);
  }

  key(event) {
    const row = event.target.closest("tr[data-latent]");
    if (!row) return;
    if (event.key === "Enter") this.open(row.dataset.latent);
    const page = Math.max(1, Math.floor(this.root.clientHeight / ROW) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.activate(Math.min(this.order.length - 1, Math.max(0, Number(row.dataset.at) + steps[event.key])));
    const y = this.active * ROW;
    if (y < this.root.scrollTop) this.root.scrollTop = y;
    else if (y + 3 * ROW > this.root.scrollTop + this.root.clientHeight) this.root.scrollTop = y + 3 * ROW - this.root.clientHeight;
    this.render();
    this.rows.get(this.active)?.focus({ preventScroll: true });
  }

  /** Makes a row the one that the Tab key reaches. */
  activate(at) {
    this.rows.get(this.active)?.setAttribute("tabindex", -1);
    this.active = at;
    this.rows.get(at)?.setAttribute("tabindex", 0);
  }

  /** Back in sight: a hidden element forgets how far it was scrolled and what had the focus. */
  resume(returning) {
    const { active } = this;
    this.render();
    this.root.scrollTop = this.top;
    this.render();
    if (!this.rows.has(active)) return;
    this.activate(active);
    if (returning && !document.activeElement.closest("header, section:not([hidden])")) this.rows.get(active).focus({ preventScroll: true });
  }
}
