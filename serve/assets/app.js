"use strict";

const at = (id) => document.getElementById(id);
const TOKEN = [52, 211, 153];
const DARK = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;

async function ask(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const answer = await fetch(path, options);
  if (answer.status === 401) { // the session has ended: the log-in takes this page's place, and leads back to it
    sessionStorage.setItem("text", at("text").value);
    location.reload();
  }
  const told = await answer.json();
  if (!answer.ok) { throw new Error(told.detail || `The server answered ${answer.status}.`); }
  return told;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) { made.textContent = text; }
  if (className) { made.className = className; }
  return made;
}

const fixed = (value, digits) => (value === null || value === undefined ? "-" : value.toFixed(digits));
const shown = (token) => token.replace(/\n/g, "↵\n");
const BLANKS = { "\n": "line break", "\r": "line break", "\t": "tab" };
const spoken = (token) => (token.trim() ? token : [...token].map((one) => BLANKS[one] ?? "space").join(" "));

function problem(error) {
  at("problem").hidden = !error;
  at("problem").textContent = error ? error.message : "";
}

async function listSaes() {
  const { saes } = await ask("/saes");
  const order = [...saes].sort((a, b) => b.promoted - a.promoted || (a.metrics?.fvu ?? 9) - (b.metrics?.fvu ?? 9));
  for (const sae of order) {
    at("sae").append(new Option(sae.id, sae.id));
    const row = element("tr");
    row.append(element("td", sae.id), element("td", sae.hook), element("td", sae.d_sae.toLocaleString("en"), "number"),
      element("td", fixed(sae.metrics?.l0, 1), "number"), element("td", fixed(sae.metrics?.fvu, 3), "number"),
      element("td", sae.promoted ? "yes" : ""));
    at("saes").append(row);
  }
  const tell = () => {
    const sae = saes.find((one) => one.id === at("sae").value);
    at("facts").textContent = sae ? `${sae.model}, ${sae.hook}: ${sae.d_sae.toLocaleString("en")} features` : "No SAE is hosted yet: train one, or promote one that the store holds.";
  };
  at("sae").addEventListener("change", tell);
  tell();
  at("go").disabled = at("sae").disabled = !saes.length;
}

// Relative luminance of WCAG.
function luminance(rgb) {
  const [r, g, b] = rgb.map((one) => (one / 255 <= 0.04045 ? one / 255 / 12.92 : ((one / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Black or white, whichever stands out more: one of them has a contrast of 4.58 at least on any ground.
function ink(depth) {
  const under = getComputedStyle(at("tokens")).backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number);
  const light = luminance(under.map((one, place) => depth * TOKEN[place] + (1 - depth) * one));
  return (light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000" : "#fff";
}

function colour() {
  [...at("tokens").children].forEach((token, place) => {
    const value = chosen ? chosen.values[place] : 0;
    const share = value > 0 ? value / chosen.max : 0;
    const depth = share > 0 ? 0.05 + 0.95 * Math.log10(1 + 9 * share) : 0;
    token.style.setProperty("background-color", depth ? `rgba(${TOKEN.join(",")},${depth})` : "transparent");
    token.style.setProperty("color", depth ? ink(depth) : "");
    token.setAttribute("aria-label", `${spoken(token.dataset.token)} ${fixed(value, 2)}`);
  });
}

function choose(row, feature) {
  for (const other of at("features").children) {
    other.classList.toggle("chosen", other === row);
    other.querySelector("button").setAttribute("aria-pressed", other === row);
  }
  chosen = feature;
  colour();
}

function point(token) {
  at("tip").hidden = !token;
  if (!token) { return; }
  at("tip").textContent = token.dataset.strongest;
  const around = at("tokens").getBoundingClientRect();
  const line = [...token.getClientRects()].pop(); // a token that is broken over lines: where it ends
  const rightmost = around.width - at("tip").offsetWidth;
  at("tip").style.left = `${Math.max(0, Math.min(line.left - around.left, rightmost))}px`;
  at("tip").style.top = `${line.bottom - around.top}px`;
}

function featureRow(feature) {
  const row = element("tr", undefined, "choice");
  const button = element("button", String(feature.feature), "plain");
  const cell = element("td");
  cell.append(button);
  row.append(cell, element("td", fixed(feature.max, 2), "number"), element("td", fixed(feature.mean, 3), "number"),
    element("td", feature.label || "-"));
  row.addEventListener("click", () => choose(row, feature));
  return row;
}

function show(reading) {
  const [name, found] = Object.entries(reading.saes)[0];
  at("shown").textContent = name;
  at("tip").hidden = true;
  at("tokens").replaceChildren(...reading.tokens.map((token, place) => {
    const made = element("span", shown(token));
    made.dataset.token = token;
    const strongest = found.per_token[place].slice(0, 5).map((one) => `${one.feature}  ${fixed(one.value, 2)}`);
    made.dataset.strongest = strongest.join("\n") || "no feature fires";
    made.tabIndex = place ? -1 : 0;
    made.setAttribute("role", "listitem");
    made.setAttribute("aria-describedby", "tip");
    return made;
  }));
  at("features").replaceChildren(...found.features.map(featureRow));
  const fires = found.features.length > 0;
  at("none").hidden = fires;
  at("strongest").hidden = at("colours").hidden = !fires;
  at("unknown").hidden = !fires || found.features.some((feature) => feature.label);
  at("found").hidden = false;
  chosen = null;
  if (fires) { choose(at("features").firstChild, found.features[0]); } else { colour(); }
}

// One stop of the Tab key for all tokens; arrows go from one to the next.
at("tokens").addEventListener("keydown", (event) => {
  const tokens = [...at("tokens").children];
  const here = tokens.indexOf(event.target);
  const places = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 };
  const next = tokens[places[event.key]];
  if (event.key === "Escape") { point(null); }
  if (!next) { return; }
  event.preventDefault();
  next.focus();
});
at("tokens").addEventListener("focusin", (event) => {
  for (const token of at("tokens").children) { token.tabIndex = token === event.target ? 0 : -1; }
});
for (const begins of ["pointerover", "focusin"]) {
  at("tokens").addEventListener(begins, (event) => point(event.target === at("tokens") ? null : event.target));
}
for (const ends of ["pointerleave", "focusout"]) { at("tokens").addEventListener(ends, () => point(null)); }
DARK.addEventListener("change", colour);

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("go").disabled = true;
  try {
    const answer = await ask("/interpret", { text: at("text").value, sae: at("sae").value, top_k: 15 });
    problem(null);
    show(answer.texts[0]);
  } catch (error) {
    problem(error);
  } finally {
    at("go").disabled = false;
  }
});

at("text").value = sessionStorage.getItem("text") ?? at("text").value;
sessionStorage.removeItem("text");
listSaes().catch(problem);
