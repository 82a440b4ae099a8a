/* The report's data and how it becomes text: script tags bring it in, for pages on disk may not fetch. */

const version = document.body.dataset.version;
const loads = new Map();
const arrivals = new Map();

const nameOf = (kind, index) => (index === null ? kind : `${kind}-${String(index).padStart(5, "0")}`);

const SAE = {
  /** Called by every data file. */
  receive(kind, index, value) {
    arrivals.get(nameOf(kind, index))?.(value);
  },
};

/** An element; strings among the children become text, null is left out. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== ""));
  return element;
}

function load(kind, index = null) {
  const name = nameOf(kind, index);
  if (!loads.has(name)) {
    const arrival = new Promise((resolve, reject) => {
      arrivals.set(name, resolve);
      const script = h("script", { src: `data/${name}.js?${version}` });
      script.onerror = () => {
        loads.delete(name);
        reject(new Error(`data/${name}.js could not be read; the folder data/ belongs beside index.html.`));
      };
      document.head.append(script);
    });
    loads.set(name, kind === "latents" ? arrival.then(unpack) : arrival);
  }
  return loads.get(name);
}

/** Base64 of deflated JSON. */
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

/* Tokens. `tokens[i]` is the text in quotes; contexts show it without them. */

let tokens = [];

function bare(index) {
  const text = tokens[index];
  const quoted = text.length > 2 && text.startsWith('"') && text.endsWith('"');
  return quoted ? text.slice(1, -1).replace(/\\(["\\])/g, "$1") : text;
}

const token = (index) => h("bdi", { class: "token", title: tokens[index] }, tokens[index]);

/* Numbers, to three significant digits. */

const whole = (x) => x.toLocaleString("en");

function figure(x) {
  if (x === null) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-3) return x.toExponential(1).replace("e+", "e").replace("-", "−");
  const text = size >= 999.5 ? whole(Math.round(x)) : x.toPrecision(3);
  return text.replace("-", "−");
}

function percent(x) {
  if (x === null) return "–";
  const p = 100 * x;
  if (p === 0) return "0 %";
  return `${p >= 99.95 ? Math.round(p) : p >= 1 ? p.toFixed(1) : p >= 0.001 ? p.toPrecision(2) : figure(p)} %`;
}

/** A ratio, to two or three digits; large ones in thousands. */
function ratio(x) {
  if (x >= 999.5) return `${whole(Number((x / 1000).toPrecision(3)))}k`;
  return x >= 99.5 ? whole(Math.round(x)) : x.toPrecision(x < 9.95 ? 2 : 3);
}

const times = (x) => (x === null ? "–" : `×${ratio(x)}`);
