/* Pages of the report by the address after #, so that Back works and every page can be linked. */

const view = (name) => document.getElementById(`view-${name}`);
const views = ["overview", "latents", "latent", "geometry", "method"].filter(view); // without latents, two of them
const failure = document.getElementById("failure");
let table = null;

const ready = view("latents") && readTable();

async function readTable() {
  const [data, texts] = await Promise.all([load("table"), load("tokens")]);
  tokens = texts;
  glance(data);
  return { data, at: new Map(data.columns.latent?.map((latent, i) => [latent, i])) };
}

function fail(error) {
  failure.textContent = error.message;
  failure.hidden = false;
}

async function route(event) {
  const [path, query] = location.hash.slice(1).split("?");
  const [name, number = ""] = path.split("/");
  const shown = views.includes(name) ? name : "overview";
  for (const other of views) view(other).hidden = other !== shown;
  for (const link of document.querySelectorAll("[data-view]")) {
    const here = shown === link.dataset.view || (shown === "latent" && link.dataset.view === "latents");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  failure.hidden = true;
  const title = document.body.dataset.title;
  const names = { overview: "", latents: "Latents – ", geometry: "Geometry – ", method: "Method – ", latent: `${nameOfLatent(number)} – ` };
  document.title = names[shown] + title;
  window.scrollTo(0, 0);
  try {
    if (shown === "latents") await showTable(query, Boolean(event));
    if (shown === "latent") await showLatent(number);
    if (event && shown !== "latents") view(shown).querySelector("h1")?.focus({ preventScroll: true });
  } catch (error) {
    fail(error);
  }
}

/* The table and its filters. */

const form = document.getElementById("filters");
const field = (id) => document.getElementById(id);

async function showTable(query, returning) {
  const { data } = await ready;
  table ??= makeTable(data);
  if (query !== undefined) {
    const wanted = fromQuery(query);
    if (JSON.stringify(wanted) !== JSON.stringify(table.state)) table.set(wanted);
  }
  fill(table.state);
  table.resume(returning);
  remember();
}

function makeTable(data) {
  const made = new LatentTable(data, document.getElementById("table"), (latent) => {
    remember();
    location.hash = `latent/${latent}`;
  });
  made.changed = () => {
    count(made);
    clearTimeout(made.timer);
    made.timer = setTimeout(remember, 150);
  };
  count(made);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => made.set(read()));
  return made;
}

const count = ({ order, n }) => {
  field("count").textContent = `${whole(order.length)} of ${whole(n)} latents`;
};

const read = () => ({
  q: field("query").value,
  show: form.elements.show.value,
  min: field("density").value,
  above: field("above").checked,
});

function fill({ q, show, min, above }) {
  field("query").value = q;
  form.elements.show.value = show;
  field("density").value = min;
  field("above").checked = above;
}

function fromQuery(query) {
  const given = new URLSearchParams(query);
  const text = (name, fits = /^/) => (fits.test(given.get(name) ?? "") ? given.get(name) : null) ?? START[name];
  const show = text("show", /^(all|alive|dead)$/);
  const min = text("min", /^-?\d*\.?\d+(e-?\d{1,2})?$/i);
  return { ...START, q: text("q"), sort: text("sort"), show, min, down: given.has("down"), above: given.has("above") };
}

/** Keeps sort, search and filters in the address, while the table is in sight. */
function remember() {
  if (!table || view("latents").hidden) return;
  const changed = Object.entries(table.state).filter(([name, value]) => value !== START[name]);
  const query = new URLSearchParams(changed.map(([name, value]) => [name, value === true ? "" : value]));
  history.replaceState(null, "", `#latents${changed.length ? `?${query}` : ""}`);
}

/* One latent. */

async function showLatent(number) {
  const { data, at } = await ready;
  const here = location.hash;
  const latent = /^\d+$/.test(number) ? Number(number) : -1;
  const i = at.get(latent);
  let content = h("p", { class: "banner", role: "alert" }, `Latent ${latent} was not read for this report.`);
  if (i !== undefined) {
    const pages = await load("latents", Math.floor(i / data.per_file));
    if (location.hash !== here) return;
    content = latentPage(data, i, pages[i % data.per_file]);
  } else if (latent < 0 || latent >= data.n_latents) {
    content = h("p", { class: "banner", role: "alert" }, outOfRange(number, data));
  }
  const parts = [latentHead(number, latent, data), content].flat().filter((part) => part !== null);
  view("latent").replaceChildren(...parts);
}

const nameOfLatent = (number) => (number === "" ? "Latent" : `Latent ${number}`);

const outOfRange = (number, { n_latents }) =>
  `There is no latent ${number === "" ? "without a number" : number}: the numbers run from 0 to ${whole(n_latents - 1)}.`;

function latentHead(number, latent, data) {
  const link = (to, text, rel) =>
    to >= 0 && to < data.n_latents ? h("a", { class: "step", href: `#latent/${to}`, rel }, text) : h("span", { class: "step" }, text);
  const input = h("input", { type: "text", inputmode: "numeric", name: "latent", size: 8, autocomplete: "off", "aria-label": "Number of a latent", placeholder: "number" });
  const message = h("p", { class: "banner", role: "alert", hidden: true });
  const jump = h("form", { class: "jump" }, h("label", {}, h("span", {}, "Go to latent"), input), h("button", { type: "submit" }, "Open"));
  jump.addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = input.value.trim().replace(/,/g, "");
    const fits = /^\d+$/.test(wanted) && Number(wanted) < data.n_latents;
    message.hidden = fits;
    message.textContent = fits ? "" : outOfRange(wanted, data);
    if (fits) location.hash = `latent/${Number(wanted)}`;
  });
  const known = latent >= 0 && latent < data.n_latents;
  return [
    h("div", { class: "head" },
      h("h1", { tabindex: -1 }, nameOfLatent(known ? latent : number)),
      known ? h("span", { class: "steps" }, link(latent - 1, `← ${latent - 1}`, "prev"), link(latent + 1, `${latent + 1} →`, "next")) : null,
      jump),
    message,
  ];
}

/* The latents on the overview: how many, and some of the clearest. */

function glance(data) {
  const { columns: c, n_latents } = data;
  const root = document.getElementById("glance");
  const n = c.latent?.length ?? 0;
  if (!n) return root.replaceChildren(h("p", { class: "fine" }, `None of the ${whole(n_latents)} latents was read for this report.`));
  const isClear = LatentTable.prototype.isClear.bind({ c, data });
  const rows = Array.from({ length: n }, (_, i) => i);
  const alive = rows.filter((i) => c.firings[i]).length;
  const clear = rows.filter(isClear);
  const tile = (value, text, href) => h("a", { class: "tile", href }, h("b", {}, whole(value)), h("span", {}, text));
  const seen = new Set();
  const examples = clear
    .sort((a, b) => c.clarity[b] - c.clarity[a])
    .filter((i) => c.fires_on[i].length && !seen.has(c.fires_on[i][0]) && seen.add(c.fires_on[i][0]))
    .slice(0, 12);
  root.replaceChildren(
    h("div", { class: "tiles" },
      tile(n, n === n_latents ? "latents" : `latents read, of ${whole(n_latents)}`, "#latents?"),
      tile(alive, "fired on the rows seen", "#latents?show=alive"),
      tile(n - alive, "dead: never fired on them", "#latents?show=dead"),
      tile(clear.length, "clearer than chance", "#latents?above=&sort=clarity&down=")),
    examples.length ? h("h3", {}, "Some of the clearest") : "",
    h("div", { class: "examples" }, examples.map((i) =>
      h("a", { href: `#latent/${c.latent[i]}` }, h("small", {}, String(c.latent[i])), c.fires_on[i].map(token)))),
  );
}

window.addEventListener("hashchange", route);
ready?.catch((error) => {
  document.getElementById("glance").replaceChildren();
  fail(error);
});
route();
