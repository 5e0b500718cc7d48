// Plays the sampler: its settings as sliders over real logits. Starts the players called PLAYER.
(() => {
  "use strict";

  const NUM_BARS = 10;
  const SETTINGS = [
    { name: "temperature", label: "Temperature", max: 3, step: 0.05, start: 1, show: (x) => (x ? x.toFixed(2) : "greedy") },
    { name: "min_p", label: "Min-p", max: 0.5, step: 0.01, start: 0, show: (x) => (x ? x.toFixed(2) : "off") },
    { name: "top_k", label: "Top-k", max: 50, step: 1, start: 0, show: (x) => (x ? String(x) : "all") },
    { name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.05, start: 1, show: (x) => (x < 1 ? x.toFixed(2) : "off") },
    { name: "seed", label: "Seed", max: 31, step: 1, start: 0, show: String },
  ];

  const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const label = (text) => escape(text.replace(/ /g, "␣").replace(/\n/g, "⏎"));
  const round = Math.fround; // the sampler computes in float32, so each result is rounded to it here, too

  // The stages of folovllm.sample.sampler, in its order; what is removed is -Infinity.

  function applyTemperature(logits, temperature) {
    const largest = Math.max(...logits);
    return logits.map((x) => round(round(x - largest) / round(temperature)));
  }

  function applyMinP(logits, minP) {
    const threshold = round(Math.max(...logits) + round(Math.log(round(minP))));
    return logits.map((x) => (x < threshold ? -Infinity : x));
  }

  function applyTopK(logits, topK) {
    const threshold = [...logits].sort((a, b) => b - a)[topK - 1];
    return logits.map((x) => (x < threshold ? -Infinity : x));
  }

  function applyTopP(logits, topP) {
    const probs = softmax(logits);
    const likeliest = [...probs].sort((a, b) => b - a);
    let total = 0;
    const reached = likeliest.findIndex((p) => round((total += p)) >= round(topP));
    const threshold = likeliest[reached < 0 ? likeliest.length - 1 : reached];
    return logits.map((x, i) => (probs[i] < threshold ? -Infinity : x));
  }

  function softmax(logits) {
    const largest = Math.max(...logits);
    const powers = logits.map((x) => round(Math.exp(round(x - largest))));
    const total = round(powers.reduce((sum, x) => sum + x, 0));
    return powers.map((x) => round(x / total));
  }

  function sample(logits, settings) {
    if (settings.temperature === 0) {
      const token = logits.indexOf(Math.max(...logits));
      return { probs: logits.map((_, i) => Number(i === token)) };
    }
    let scores = applyTemperature(logits, settings.temperature);
    if (settings.min_p > 0) scores = applyMinP(scores, settings.min_p);
    if (settings.top_k > 0 && settings.top_k < scores.length) scores = applyTopK(scores, settings.top_k);
    if (settings.top_p < 1) scores = applyTopP(scores, settings.top_p);
    return { probs: softmax(scores) };
  }

  /** The first token whose cumulative probability is above the number, and where its slice begins and ends. */
  function draw(probs, uniform) {
    let total = 0;
    const cumulative = probs.map((p) => (total += p));
    const token = cumulative.findIndex((c) => c > uniform * total);
    return { token, cumulative: cumulative.map((c) => c / total) };
  }

  function start(root, data) {
    const rows = data.rows.map((row) => row.logits.map((x) => (x === null ? -Infinity : x / data.resolution)));
    const live = root.querySelector(".fp-live");
    const slider = ({ name, label, min = 0, max, step, start }) =>
      `<label><span>${label}</span><input type="range" name="${name}" min="${min}" max="${max}" step="${step}" value="${start}"><output></output></label>`;
    const choice = data.rows.map((row, i) => `<option value="${i}">${escape(row.text)}</option>`).join("");
    live.innerHTML = `
      <p class="fp-row">${data.rows.length > 1 ? `<label><span>After</span><select name="row">${choice}</select></label>` : `<span>After “${escape(data.rows[0].text)}”</span>`}
      <button type="button">Reset</button></p>
      <div class="fp-two">${SETTINGS.map(slider).join("")}</div>
      <p class="fp-status" role="status" aria-live="polite"></p>
      <div class="fp-two"><div class="fp-bars"></div><div class="fp-drawn"></div></div>
      <p class="fp-seeds fp-muted"></p>`;
    root.querySelector(".fp-hint").remove();
    root.classList.add("fp-started");
    const input = (name) => live.querySelector(`[name="${name}"]`);

    function show() {
      const settings = {};
      for (const { name, show } of SETTINGS) {
        settings[name] = Number(input(name).value);
        input(name).nextElementSibling.textContent = show(settings[name]);
        input(name).setAttribute("aria-valuetext", show(settings[name]));
      }
      const row = data.rows.length > 1 ? Number(input("row").value) : 0;
      const before = softmax(rows[row]);
      const { probs } = sample(rows[row], settings);
      const hits = data.uniforms.map((u) => draw(probs, u).token);
      const uniform = data.uniforms[settings.seed];
      const drawn = draw(probs, uniform);
      const kept = probs.filter((p) => p > 0).length;
      Object.assign(root.dataset, { token: drawn.token, kept });
      live.querySelector(".fp-status").textContent = tell(settings, kept, uniform, drawn.token, probs);
      live.querySelector(".fp-bars").innerHTML = bars(before, probs, drawn.token);
      live.querySelector(".fp-drawn").innerHTML = curve(probs, drawn, uniform);
      live.querySelector(".fp-seeds").textContent = `What the ${hits.length} seeds hit: ${count(hits)}.`;
    }

    const textOf = (token) => data.texts[token].replace(/ /g, "␣").replace(/\n/g, "⏎");

    function tell(settings, kept, uniform, token, probs) {
      const left = data.texts.length < data.vocabSize ? `the ${data.texts.length.toLocaleString("en")} likeliest tokens` : `${data.vocabSize.toLocaleString("en")} tokens`;
      const stay = `${kept.toLocaleString("en")} of ${left} ${kept === 1 ? "stays" : "stay"}`;
      if (settings.temperature === 0) return `Greedy: the likeliest token is taken, ${textOf(token)}, whatever the seed.`;
      return `${stay}. The number ${uniform.toFixed(3)} of seed ${settings.seed} hits ${textOf(token)}, which has ${probs[token].toFixed(3)}.`;
    }

    function count(hits) {
      const counts = new Map();
      for (const token of hits) counts.set(token, (counts.get(token) ?? 0) + 1);
      const told = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
      const others = told.slice(NUM_BARS).reduce((sum, [, n]) => sum + n, 0);
      return told.slice(0, NUM_BARS).map(([token, n]) => `${textOf(token)} ${n}`).join(", ") + (others ? `, others ${others}` : "");
    }

    function bars(before, probs, hit) {
      const order = before.map((_, i) => i).sort((a, b) => before[b] - before[a] || a - b);
      const first = order.slice(0, NUM_BARS);
      if (!first.includes(hit)) first.splice(-1, 1, hit);
      const shown = first.map((i) => [label(data.texts[i]), before[i], probs[i], i === hit]);
      const rest = (values) => Math.max(0, 1 - first.reduce((sum, i) => sum + values[i], 0));
      shown.push(["all others", rest(before), rest(probs), false]);
      const widest = Math.max(...shown.map(([, was, p]) => Math.max(was, p)));
      const part = (p) => `style="width:${((100 * p) / widest).toFixed(2)}%"`;
      const line = ([text, was, p, isHit]) =>
        `<div class="fp-bar${isHit ? " fp-hit" : ""}"><span>${text}</span><span><span ${part(p)}></span><span class="fp-was" ${part(was)}></span></span><span>${p.toFixed(3)}</span></div>`;
      return `<p class="fp-title">Probabilities; the frames: as the model gave them</p>${shown.map(line).join("")}`;
    }

    function curve(probs, { token, cumulative }, uniform) {
      const [left, right, top, bottom] = [34, 318, 8, 172];
      const kept = probs.map((_, i) => i).filter((i) => probs[i] > 0);
      const width = (right - left) / kept.length;
      const y = (share) => (bottom - (bottom - top) * share).toFixed(1);
      const x = (place) => (left + width * place).toFixed(1);
      const path = kept.map((i, place) => `L${x(place)} ${y(cumulative[i])}H${x(place + 1)}`).join("");
      const hit = kept.indexOf(token);
      const end = hit < kept.length / 2 ? "" : ' class="fp-end"';
      const name = `<text x="${Number(x(hit)) + (end ? 2 : -2)}" y="188"${end}>${label(data.texts[token])}</text>`;
      const above = uniform < 0.85 ? -5 : 14;
      return `<p class="fp-title">Added up, in the order of the vocabulary</p>
        <svg viewBox="0 0 320 192" role="img" aria-label="Staircase of the added probabilities of ${kept.length} tokens; the height ${uniform.toFixed(3)} meets it at ${label(data.texts[token])}.">
        <path class="fp-frame" d="M${left} ${top}V${bottom}H${right}"/><text x="28" y="14" class="fp-end">1</text><text x="28" y="174" class="fp-end">0</text>
        <path class="fp-curve" d="M${left} ${bottom}${path}"/>
        <path class="fp-ray" d="M${left} ${y(uniform)}H${x(hit)}V${bottom}"/><text x="${left + 4}" y="${Number(y(uniform)) + above}">${uniform.toFixed(3)}</text>${name}</svg>`;
    }

    live.addEventListener("input", show);
    live.querySelector("button").addEventListener("click", () => {
      for (const { name, start } of SETTINGS) input(name).value = start;
      show();
    });
    show();
  }

  for (const root of document.querySelectorAll('[data-player="PLAYER"]:not([data-token])')) {
    start(root, JSON.parse(root.querySelector('script[type="application/json"]').textContent));
  }
})();
