/* The page of one latent. */

const BANDS = [
  [0.99, "Strongest 1 % of firings"],
  [0.9, "90–99 %"],
  [0.5, "50–90 %"],
  [0, "Weaker half"],
];

/** Row `i` of the table data and the latent's own record, as a list of elements. */
function latentPage(data, i, page) {
  const row = Object.fromEntries(Object.entries(data.columns).map(([name, column]) => [name, column[i]]));
  const enough = row.firings >= data.enough_firings;
  const few = `It fired on ${whole(row.firings)} rows only; below ${data.enough_firings} the numbers are anecdotes.`;
  const dead = "Dead: never fired on the rows seen; only its direction is known.";
  return [
    h("p", { class: "summary" }, row.firings ? summary(row, page, enough) : ""),
    row.firings && enough ? null : h("p", { class: "banner", role: "note" }, row.firings ? few : dead),
    h("div", { class: "cards" }, inputCards(page)),
    contexts(row, page),
    page.raises.length ? h("h2", {}, "What it makes the model say") : null,
    h("div", { class: "cards" }, outputCards(page)),
    page.ablation ? ablation(page.ablation) : null,
    page.counts.length ? histogram(page) : null,
  ];
}

function summary(row, page, enough) {
  const n = row.effective_tokens;
  const verdict = enough && page.null ? (row.clarity > page.null.clarity ? "clearer than" : "no clearer than") : "beside";
  return [
    `Fires on ${percent(row.density)} of tokens (${whole(row.firings)} of those seen) with a mean activation of `,
    `${figure(row.mean)} and a largest of ${figure(row.largest)}. Its clarity is ${figure(row.clarity)}`,
    page.null ? `, ${verdict} random directions that fire as often (${figure(page.null.clarity)})` : "",
    `: it spreads over as many kinds of token as ${figure(n)} equally frequent one${n === 1 ? "" : "s"} would.`,
  ].join("");
}

/* Tokens with their scores, chance in the last row. */

const PERCENTILE = "95th percentile of the same score among random directions";

function card(title, hint, head, rows, chance, meaning = PERCENTILE) {
  if (!rows.length) return null;
  const cells = (row) => row.map((cell, at) => h(at ? "td" : "th", at ? {} : { scope: "row" }, cell));
  return h(
    "section",
    { class: "card" },
    h("h2", {}, title),
    h("p", { class: "fine" }, hint),
    h(
      "table",
      { class: "plain scores" },
      h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, cells(row)))),
      chance ? h("tfoot", { title: meaning }, h("tr", {}, cells(chance))) : null,
    ),
  );
}

function inputCard(title, hint, list, chance) {
  const rows = list.map(([t, share, lift, low, high, firings]) => [
    token(t), percent(share), times(lift), h("small", {}, low === null ? "–" : `${ratio(low)}–${ratio(high)}`), whole(firings),
  ]);
  const last = chance === null ? null : ["random directions", percent(chance), "", "", ""];
  return card(title, hint, ["token", "share", "lift", "95 %", "firings"], rows, last);
}

function outputCard(title, hint, list, page, sign) {
  const { null: chance } = page;
  const rows = list.map(([t, logit, cosine]) => [token(t), figure(logit), figure(cosine)]);
  const last = chance ? ["random directions", figure(sign * chance.logit), figure(sign * chance.cosine)] : null;
  return card(title, hint, ["token", "logit", "cosine"], rows, last);
}

const inputCards = (page) => [
  inputCard("Fires on", "The token at its firings", page.fires_on, page.null?.share ?? null),
  inputCard("Right before", "The token one position earlier", page.before, page.null?.previous_share ?? null),
];

const outputCards = (page) => [
  outputCard("Raises", "Logit lens; weak evidence in middle layers", page.raises, page, 1),
  outputCard("Lowers", "The other end of the same list", page.lowers, page, -1),
];

function ablation({ raised, lowered, kl, random_kl, random_change, positions }) {
  const changes = (title, hint, list, sign) => {
    const rows = list.map(([t, value]) => [token(t), figure(value)]);
    const chance = ["random directions", random_change === null ? "–" : figure(sign * random_change)];
    return card(title, hint, ["token", "logit"], rows, chance, "Largest change of a logit when random directions of equal length are subtracted instead, mean of four");
  };
  const where = positions === 1 ? "at its strongest firing" : `at its ${whole(positions)} strongest firings`;
  return h(
    "section",
    {},
    h("h2", {}, "Measured by ablation"),
    h("p", {}, `Set to zero ${where}, the model's next-token distribution moves by `,
      h("b", {}, `${figure(kl)} nats`), ` (KL); subtracting random directions of equal length moves it by ${figure(random_kl)} nats.`),
    h("div", { class: "cards" },
      changes("Promoted", "Logit lost without it", raised, 1),
      changes("Suppressed", "Logit gained without it", lowered, -1)),
  );
}

/* Histogram of activations on a logarithmic axis. */

function s(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function histogram({ edges, counts }) {
  const [width, height, left, bottom] = [640, 190, 52, 40];
  const log = edges[0] > 0 ? Math.log : (x) => x;
  const [low, high] = [log(edges[0]), log(edges.at(-1))];
  const x = (value) => left + ((log(value) - low) / (high - low || 1)) * (width - left - 12);
  const most = Math.max(...counts);
  const y = (count) => height - bottom - (count / most) * (height - bottom - 14);
  const bars = counts.map((count, at) => {
    const [from, to] = [x(edges[at]), x(edges[at + 1])];
    const box = { x: from + 0.5, y: y(count), width: Math.max(1, to - from - 1), height: height - bottom - y(count) };
    return s("rect", box, s("title", {}, `${figure(edges[at])} to ${figure(edges[at + 1])}: ${whole(count)} firings`));
  });
  const ticks = axisTicks(edges[0], edges.at(-1)).map((value) =>
    s("g", { transform: `translate(${x(value)} ${height - bottom})` }, s("line", { y2: 5 }), s("text", { y: 19, "text-anchor": "middle" }, String(value))));
  const levels = [0, most].map((count) => s("text", { x: left - 7, y: y(count) + 4, "text-anchor": "end" }, whole(count)));
  const name = `activation${edges[0] > 0 ? " (log scale)" : ""}`;
  const drawing = s(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "histogram", role: "img", "aria-label": `Histogram of activations from ${figure(edges[0])} to ${figure(edges.at(-1))}` },
    ...bars,
    s("line", { x1: left, x2: width - 12, y1: height - bottom, y2: height - bottom }),
    ...ticks,
    ...levels,
    s("text", { x: (left + width - 12) / 2, y: height - 3, "text-anchor": "middle" }, name),
    s("text", { transform: `translate(12 ${(height - bottom) / 2 + 4}) rotate(-90)`, "text-anchor": "middle" }, "firings"),
  );
  return h("section", {}, h("h2", {}, "Activations where it fired"), drawing);
}

/** Round values between two, about six: 1, 2, 5 of each power of ten, or powers only. */
function axisTicks(low, high) {
  if (low <= 0) return [low, high];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const digit of [1, 2, 5]) ticks.push(Number((digit * 10 ** power).toPrecision(1)));
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  const few = inside.length > 8 ? inside.filter((tick) => /^[10.e+-]+$/.test(String(tick))) : inside;
  return few.length > 1 ? few : [Number(figure(low).replace(/,/g, "")), Number(figure(high).replace(/,/g, ""))];
}

/* Contexts. */

function contexts(row, page) {
  const list = (name, items) => [h("h3", {}, name), h("ol", { class: "contexts" }, items.map((item) => context(item, row.largest)))];
  const bands = BANDS.map(([from, name], at) => [name, page.sampled.filter((c) => c[3] >= from && (at === 0 || c[3] < BANDS[at - 1][0]))]);
  if (!page.top.length && !page.sampled.length) return null;
  return h(
    "section",
    {},
    h("h2", {}, "Contexts"),
    page.top.length ? list("Strongest, one for each sequence", page.top) : null,
    page.sampled.length ? h("p", { class: "fine" }, "Below: a uniform sample of its firings, by how strong they are among all of them.") : null,
    bands.filter(([, items]) => items.length).map(([name, items]) => list(name, items)),
  );
}

function context([sequence, begin, peak, quantile, ids, fired], largest) {
  const values = new Map();
  for (let at = 0; at < fired.length; at += 2) values.set(fired[at], fired[at + 1]);
  const words = ids.map((id, at) => {
    const value = values.get(at) ?? 0;
    const written = /^(\\[a-zA-Z][0-9a-f]*)+$/.test(bare(id)) ? " written" : "";
    const name = `word${at === peak ? " peak" : ""}${written}${value ? " fired" : ""}`;
    const word = h("span", { class: name, title: `${tokens[id]}  ${figure(value)}` }, bare(id));
    if (value) word.style.setProperty("--a", (0.1 + 0.75 * Math.min(1, Math.abs(value) / (largest || 1))).toFixed(3));
    return word;
  });
  const where = `sequence ${whole(sequence)}, position ${whole(begin + peak)}`;
  const meta = h("span", { class: "meta", title: `${where}; no weaker than ${percent(quantile)} of its firings` },
    h("b", {}, figure(values.get(peak) ?? 0)), h("small", {}, `seq ${whole(sequence)} · pos ${whole(begin + peak)}`));
  return h("li", {}, meta, h("p", { class: "text" }, words));
}
