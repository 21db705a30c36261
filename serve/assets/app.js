"use strict";

const at = (id) => document.getElementById(id);
const TOKEN = [52, 211, 153];

async function ask(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const answer = await fetch(path, options);
  if (answer.status === 401) { location.reload(); }
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

function problem(error) {
  at("problem").hidden = !error;
  at("problem").textContent = error ? error.message : "";
}

async function listSaes() {
  const { saes } = await ask("/saes");
  const order = [...saes].sort((a, b) => b.promoted - a.promoted || (a.metrics.fvu ?? 9) - (b.metrics.fvu ?? 9));
  for (const sae of order) {
    at("sae").append(new Option(sae.id, sae.id));
    const row = element("tr");
    row.append(element("td", sae.id), element("td", sae.hook), element("td", sae.d_sae.toLocaleString("en"), "number"),
      element("td", fixed(sae.metrics.l0, 1), "number"), element("td", fixed(sae.metrics.fvu, 3), "number"),
      element("td", sae.promoted ? "yes" : ""));
    at("saes").append(row);
  }
  const tell = () => {
    const sae = saes.find((one) => one.id === at("sae").value);
    at("facts").textContent = sae ? `${sae.model}, ${sae.hook}: ${sae.d_sae.toLocaleString("en")} features` : "No SAE is hosted yet.";
  };
  at("sae").addEventListener("change", tell);
  tell();
}

function colour(values, highest) {
  [...at("tokens").children].forEach((token, place) => {
    const share = highest > 0 ? Math.max(0, values[place] / highest) : 0;
    const depth = share > 0 ? 0.05 + 0.95 * Math.log10(1 + 9 * share) : 0;
    token.style.setProperty("background-color", depth ? `rgba(${TOKEN.join(",")},${depth})` : "transparent");
    token.classList.toggle("fires", depth > 0.35);
    token.setAttribute("aria-label", `${token.dataset.token} ${fixed(values[place], 2)}`);
  });
}

function choose(row, feature) {
  for (const other of at("features").children) { other.setAttribute("aria-selected", other === row); }
  colour(feature.values, feature.max);
}

function show(reading) {
  const [name, found] = Object.entries(reading.saes)[0];
  at("shown").textContent = name;
  at("tokens").replaceChildren(...reading.tokens.map((token, place) => {
    const made = element("span", shown(token));
    made.dataset.token = token;
    made.tabIndex = 0;
    const strongest = found.per_token[place].slice(0, 5).map((one) => `${one.feature}  ${fixed(one.value, 2)}`);
    made.append(element("span", strongest.join("\n") || "no feature fires", "tip"));
    return made;
  }));
  at("features").replaceChildren(...found.features.map((feature) => {
    const row = element("tr", undefined, "choice");
    row.tabIndex = 0;
    row.append(element("td", String(feature.feature)), element("td", fixed(feature.max, 2), "number"),
      element("td", fixed(feature.mean, 3), "number"), element("td", feature.label || "-"));
    row.addEventListener("click", () => choose(row, feature));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") { choose(row, feature); } });
    return row;
  }));
  at("unknown").hidden = found.features.some((feature) => feature.label);
  at("found").hidden = false;
  if (found.features.length) { choose(at("features").firstChild, found.features[0]); }
}

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

listSaes().catch(problem);
