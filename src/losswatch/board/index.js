// The tab Losses. Everything is computed by plugin.py; this asks for it and shows it.

const SECONDS = 5; // between two looks for new data
const PREFIX = "p.losswatch."; // of what TensorBoard leaves alone in its address

const STYLE = `
  body { font: 13px/1.5 Roboto, sans-serif; margin: 12px; color: #222; background: white }
  #controls { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center }
  #controls input[type=text] { width: 22em }
  #lines { color: #a04000; margin: 6px 0 }
  html { overflow-y: scroll; background: white }
  html.dark { filter: invert(0.9) hue-rotate(180deg) } /* the same hues on a dark page */
`;

let state = readAddress();
let version = "";
let timer, controls, lines, figure;
let plotly; // fulfilled when Plotly is loaded, or cannot be
let asked = 0; // number of the newest question; answers to older ones are dropped

/** What the user has chosen, as the address holds it. */
function readAddress() {
  const parts = window.parent.location.hash.slice(1).split("&");
  const pairs = parts.map((part) => part.split("=").map(decodeURIComponent));
  const ours = pairs.filter(([key]) => key.startsWith(PREFIX));
  return Object.fromEntries(ours.map(([key, value]) => [key.slice(PREFIX.length), value ?? ""]));
}

function writeAddress() {
  const others = window.parent.location.hash.slice(1).split("&");
  const kept = others.filter((part) => !decodeURIComponent(part).startsWith(PREFIX));
  const ours = Object.entries(state).map((pair) => pair.map(encodeURIComponent).join("="));
  const hash = [...kept, ...ours.map((part) => PREFIX + part)].join("&");
  window.parent.history.replaceState(window.parent.history.state, "", `#${hash}`);
}

function choose(changes) {
  state = Object.fromEntries(
    Object.entries({ ...state, ...changes }).filter(([, value]) => value !== "")
  );
  writeAddress();
  refresh();
}

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function menu(label, key, values, none) {
  const options = [...(none ? [["", none]] : []), ...values];
  const select = element("select", { onchange: () => choose({ [key]: select.value }) },
    options.map(([value, text]) => element("option", { value, textContent: text })));
  select.value = state[key] ?? options[0][0];
  return element("label", {}, [`${label} `, select]);
}

function showControls({ sweeps, sweep, menus }) {
  if (controls.contains(document.activeElement) && document.activeElement.type === "text") return;
  const folders = sweeps.map((name) => [name, name]);
  const runs = element("input", { type: "text", value: state.runs ?? "",
    placeholder: "regular expression", onchange: () => choose({ runs: runs.value }) });
  const log = element("input", { type: "checkbox", checked: state.log === "1",
    onchange: () => choose({ log: log.checked ? "1" : "" }) });
  const folder = menu("folder", "sweep", [...folders, ["*", "all"]]);
  folder.querySelector("select").value = sweep;
  controls.replaceChildren(
    folder,
    element("label", {}, ["runs ", runs]),
    ...Object.entries(menus).map(([name, values]) =>
      menu(name, `set.${name}`, values.map((value) => [value, value]), "all")),
    element("label", {}, [log, " logarithmic norms"]),
    menu("moving mean over", "smooth", [11, 51, 201].map((n) => [`${n}`, `${n} steps`]), "1 step"),
    element("button", { textContent: "all steps", onclick: () => choose({ from: "", to: "" }) })
  );
}

async function ask(query) {
  const answer = await fetch(`./figure?${new URLSearchParams(query)}`).catch(() => {
    throw new Error("TensorBoard does not answer.");
  });
  const content = await answer.json().catch(() => ({ error: `TensorBoard: ${answer.status}` }));
  if (content.error) throw new Error(content.error);
  return content;
}

function showLines(texts) {
  lines.replaceChildren(...texts.map((textContent) => element("div", { textContent })));
}

async function refresh() {
  clearTimeout(timer);
  const mine = ++asked;
  const isDark = window.parent.document.body.classList.contains("dark-mode");
  document.documentElement.classList.toggle("dark", isDark);
  try {
    const query = { ...state, version, width: figure.clientWidth };
    const [answer] = await Promise.all([ask(query), plotly]);
    if (mine !== asked) return;
    showControls(answer);
    if (answer.version !== version) await showFigure(answer);
  } catch (error) {
    if (mine !== asked) return;
    version = ""; // so that the next answer replaces this line
    showLines([error.message]);
  }
  timer = setTimeout(refresh, SECONDS * 1000);
}

async function showFigure(answer) {
  version = answer.version;
  showLines(answer.notes);
  if (!answer.figure) return Plotly.purge(figure);
  await Plotly.react(figure, answer.figure.data, answer.figure.layout, answer.figure.config);
  figure.removeAllListeners("plotly_relayout");
  figure.on("plotly_relayout", (change) => {
    const key = Object.keys(change).find((name) => /^xaxis\d*\.(range|autorange)/.test(name));
    if (!key) return;
    const axis = key.split(".")[0];
    const [from, to] = change[`${axis}.range`] ?? [0, 1].map((i) => change[`${axis}.range[${i}]`]);
    const isAll = change[`${axis}.autorange`] || from === undefined;
    choose(isAll ? { from: "", to: "" } : { from: `${Math.floor(from)}`, to: `${Math.ceil(to)}` });
  });
}

export async function render() {
  controls = element("div", { id: "controls" });
  lines = element("div", { id: "lines", textContent: "Loading …" });
  figure = element("div", { id: "figure" });
  document.head.append(element("style", { textContent: STYLE }));
  document.body.append(controls, lines, figure);
  plotly = new Promise((resolve) => {
    const script = element("script", { src: "./plotly.js", onload: resolve, onerror: resolve });
    document.head.append(script);
  });
  refresh();
}
