// Plays a trace: moves through the steps of one run, or of two side by side. Starts the players called PLAYER.
(() => {
  "use strict";

  const NEAR = 12; // tokens of one sequence that are shown of a long chunk, at its beginning and at its end
  const MOST_BLOCKS = 60;
  const PAUSE = 700; // milliseconds between two steps that play by themselves

  const escape = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const label = (text) => escape(text.replace(/ /g, "␣").replace(/\n/g, "⏎"));
  const plural = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
  const listed = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);
  const verb = (names, one, many) => `${listed(names)} ${names.length === 1 ? one : many}`;

  function start(root, data) {
    const runs = [...root.querySelectorAll(".fp-run")].map((element, i) => makeRun(element, data.runs[i], data.texts));
    const last = Math.max(...runs.map((run) => run.steps.length)) - 1;
    const controls = root.querySelector(".fp-controls");
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const button = (name, sign, text) => `<button type="button" data-to="${name}" aria-label="${text}" title="${text}">${sign}</button>`;
    controls.innerHTML = `<div class="fp-row">
      ${button("first", "⇤", "First step")}${button("back", "←", "Step back")}
      ${still ? "" : button("play", "▷", "Play")}${button("next", "→", "Next step")}${button("last", "⇥", "Last step")}
      <label><span>Step</span><input type="range" min="1" max="${last + 1}" value="1"></label></div>
      <p class="fp-status" role="status" aria-live="polite"></p>`;
    root.querySelector(".fp-hint").remove();
    const slider = controls.querySelector("input");
    const status = controls.querySelector(".fp-status");
    const play = controls.querySelector('[data-to="play"]');
    let step = 0;
    let timer = 0;

    function show(to) {
      step = Math.min(Math.max(to, 0), last);
      root.dataset.step = step + 1;
      const told = runs.map((run) => run.show(step));
      slider.value = step + 1;
      slider.setAttribute("aria-valuetext", `step ${step + 1} of ${last + 1}`);
      const lines = [`Step ${step + 1} of ${last + 1}. ${runs.length > 1 ? "" : told.pop()}`, ...told];
      status.innerHTML = lines.map((line) => `<span>${escape(line)}</span>`).join(" ");
      for (const [name, isEnd] of [["first", step === 0], ["back", step === 0], ["next", step === last], ["last", step === last]]) {
        controls.querySelector(`[data-to="${name}"]`).setAttribute("aria-disabled", isEnd);
      }
    }

    function stop() {
      clearInterval(timer);
      timer = 0;
      status.setAttribute("aria-live", "polite");
      if (play) rename("▷", "Play");
    }

    function rename(sign, text) {
      play.textContent = sign;
      for (const name of ["aria-label", "title"]) play.setAttribute(name, text);
    }

    function toggle() {
      if (timer) return stop();
      status.setAttribute("aria-live", "off"); // nobody can listen to a sentence for each of these steps
      rename("‖", "Pause");
      if (step === last) show(0);
      timer = setInterval(() => {
        if (!root.isConnected) return stop();
        show(step + 1);
        if (step === last) stop();
      }, PAUSE);
    }

    controls.addEventListener("click", (event) => {
      const to = event.target.closest("button")?.dataset.to;
      if (to === "play") return toggle();
      if (!to) return;
      stop();
      show({ first: 0, back: step - 1, next: step + 1, last }[to]);
    });
    slider.addEventListener("input", () => {
      stop();
      show(slider.value - 1);
    });
    for (const run of runs) run.onDrag((to) => (stop(), show(to)));
    show(0);
  }

  function makeRun(element, run, texts) {
    const states = replay(run);
    const slotsAt = memory(states);
    const panels = element.querySelector(".fp-panels");
    const picture = element.querySelector("svg.fp-still");
    const left = Number(picture.dataset.left);
    const width = Number(picture.dataset.width);
    const nameOf = (seq) => run.seqs[seq].name;
    const names = (seqs) => seqs.map(nameOf);
    picture.insertAdjacentHTML("beforeend", `<rect class="fp-cursor" y="0" width="${width}%" height="${18 * run.seqs.length}"/>`);
    const cursor = picture.lastElementChild;
    const view = { run, texts, nameOf };

    function show(step) {
      const isOver = step >= states.length;
      const at = Math.min(step, states.length - 1);
      const state = { ...states[at], slots: slotsAt(at) };
      cursor.setAttribute("x", `${left + width * at}%`);
      panels.style.minHeight = `${panels.offsetHeight}px`; // what lies below does not jump back and forth
      panels.innerHTML = isOver
        ? `<p class="fp-title">This run ended after step ${states.length}.</p>`
        : queue(view, state) + batch(view, state) + blocks(view, state) + answers(view, state);
      return (run.label ? `${run.label[0].toUpperCase()}${run.label.slice(1)}: ` : "") + (isOver ? "has ended." : tell(run, state, names));
    }

    new ResizeObserver(() => (panels.style.minHeight = "")).observe(picture);

    function onDrag(go) {
      picture.classList.add("fp-ready");
      const follow = (event) => {
        const box = picture.getBoundingClientRect();
        const share = (100 * (event.clientX - box.left)) / box.width - left;
        go(Math.min(Math.max(Math.floor(share / width), 0), states.length - 1));
      };
      picture.addEventListener("pointerdown", (event) => {
        picture.setPointerCapture(event.pointerId);
        follow(event);
      });
      picture.addEventListener("pointermove", (event) => picture.hasPointerCapture(event.pointerId) && follow(event));
    }

    return { show, onDrag, steps: states };
  }

  /** How things stand in each step: the data has only what a step changes. */
  function replay(run) {
    const computed = run.seqs.map(() => 0);
    const written = run.seqs.map((seq) => seq.first ?? seq.prompt);
    let before = new Map();
    return run.steps.map((step) => {
      const places = step.places ?? [];
      const tables = new Map(places.filter((seq) => before.has(seq)).map((seq) => [seq, before.get(seq)]));
      const changed = new Map(step.tables ?? []);
      for (const [seq, table] of changed) tables.set(seq, table);
      before = tables;
      const slotOf = (seq, position) => tables.get(seq)[Math.floor(position / run.blockSize)] * run.blockSize + (position % run.blockSize);
      const writes = [];
      const fresh = new Set();
      const allGuesses = new Map(step.guesses ?? []);
      const work = (step.work ?? []).map((entry) => {
        const [seq, count = 1, first = computed[seq]] = [entry].flat();
        computed[seq] = first + count;
        const { tokens } = run.seqs[seq];
        const [known, guesses] = [written[seq], allGuesses.get(seq) ?? []];
        const tokenAt = (position) => (position < known ? tokens[position] : guesses[position - known]);
        // With a new table, what was computed before may have been copied there, or found there.
        for (let position = changed.has(seq) ? 0 : first; position < first + count; position++) {
          writes.push([slotOf(seq, position), tokenAt(position)]);
          if (position >= first) fresh.add(slotOf(seq, position));
        }
        const admitted = (step.admitted ?? []).some(([other]) => other === seq);
        return { seq, first, count, known, guesses, tokenAt, right: 0, decodes: first >= run.seqs[seq].prompt && !admitted };
      });
      const got = (step.got ?? []).map((entry) => {
        const [seq, count = 1] = [entry].flat();
        const checked = work.find((w) => w.seq === seq);
        const isRight = (i) => i < count && checked.guesses[i] === run.seqs[seq].tokens[checked.known + i];
        while (checked?.guesses.length > checked?.right && isRight(checked.right)) checked.right++;
        written[seq] += count;
        return { seq, count, bars: (step.bars ?? []).find(([other]) => other === seq)?.[1] };
      });
      const { waiting = [], swapped = [], preempted = [], finished = [], admitted = [] } = step;
      return { places, work, got, tables, slotOf, writes, fresh, waiting, swapped, preempted, finished, admitted, written: [...written], computed: [...computed] };
    });
  }

  /** What is in the slots in a step: all that was written until then, over what was there. */
  function memory(states) {
    let slots = new Map();
    let next = 0;
    return (step) => {
      if (step < next - 1) [slots, next] = [new Map(), 0];
      for (; next <= step; next++) for (const [slot, token] of states[next].writes) slots.set(slot, token);
      return slots;
    };
  }

  function tell(run, state, names) {
    const decoding = names(state.work.filter((w) => w.decodes).map((w) => w.seq));
    const reading = state.work.filter((w) => !w.decodes).map((w) => `${names([w.seq])} reads ${plural(w.count, "token")}`);
    const cached = state.admitted.filter(([, n]) => n).map(([seq, n]) => `${plural(n, "token")} of ${names([seq])} found in the cache`);
    const guessed = state.work.filter((w) => w.guesses.length).map((w) => `${names([w.seq])} guesses ${plural(w.guesses.length, "token")}, ${w.right || "none"} right`);
    const used = new Set([...state.tables.values()].flat()).size;
    const told = [
      decoding.length && verb(decoding, "decodes", "decode"),
      ...reading,
      ...cached,
      ...guessed,
      state.waiting.length && verb(names(state.waiting), "waits", "wait"),
      state.swapped.length && `${verb(names(state.swapped), "is", "are")} swapped out`,
      state.preempted.length && `${listed(names(state.preempted))} had to leave`,
      state.finished.length && verb(names(state.finished), "gets its last token", "get their last tokens"),
      `${used.toLocaleString("en")} of ${plural(run.numBlocks, "block")} in use`,
    ];
    return `${told.filter(Boolean).join("; ")}.`;
  }

  const title = (text) => `<p class="fp-title">${text}</p>`;
  const color = (view, seq) => `r${view.run.seqs[seq].color}`;

  function queue(view, state) {
    const chips = (seqs) => seqs.map((seq) => `<span class="fp-chip ${color(view, seq)}">${escape(view.nameOf(seq))}</span>`).join("");
    const line = (name, seqs) => `${title(name)}<div class="fp-flow">${chips(seqs) || '<span class="fp-chip fp-muted">nobody</span>'}</div>`;
    const task = (seq) => {
      const work = state.work.find((w) => w.seq === seq);
      if (!work) return "pauses";
      return work.decodes ? `at token ${work.known}` : `reads ${work.count.toLocaleString("en")}`;
    };
    const places = state.places.map((seq) =>
      seq < 0
        ? '<span class="fp-place fp-muted"><b>1 place</b><span>free</span></span>'
        : `<span class="fp-place ${color(view, seq)}"><b>${escape(view.nameOf(seq))}</b><span>${task(seq)}</span></span>`,
    );
    const free = view.run.numPlaces - state.places.length;
    if (free > 0) places.push(`<span class="fp-place fp-muted"><b>${plural(free, "place")}</b><span>free</span></span>`);
    return (
      line("Waiting, the next to come in first", state.waiting) +
      (state.swapped.length ? line("Swapped out", state.swapped) : "") +
      `${title("Places in the batch")}<div class="fp-flow">${places.join("")}</div>`
    );
  }

  function batch(view, state) {
    const cell = (work, i) => {
      const position = work.first + i;
      const text = label(view.texts[work.tokenAt(position)]);
      const isGuess = position >= work.known;
      const shown = isGuess && position >= work.known + work.right ? `<s>${text}</s>` : text;
      return `<span class="fp-token ${color(view, work.seq)}${isGuess ? " fp-guess" : ""}"><i>${position}</i><b>${shown}</b><small>${state.slotOf(work.seq, position)}</small></span>`;
    };
    const cells = state.work.map((work) => {
      const all = [...Array(work.count).keys()];
      if (work.count <= 2 * NEAR) return all.map((i) => cell(work, i)).join("");
      const hidden = `<span class="fp-token ${color(view, work.seq)}"><i>…</i><b>${(work.count - 2 * NEAR).toLocaleString("en")} more</b><small>…</small></span>`;
      return [...all.slice(0, NEAR).map((i) => cell(work, i)), hidden, ...all.slice(-NEAR).map((i) => cell(work, i))].join("");
    });
    const total = state.work.reduce((sum, work) => sum + work.count, 0);
    const key = state.work.some((work) => work.guesses.length) ? "; dashed: a guess, crossed out: a wrong one" : "";
    return `${title(`The flat batch, ${plural(total, "token")}: position, token, slot${key}`)}<div class="fp-flow">${cells.join("")}</div>`;
  }

  function blocks(view, state) {
    const size = view.run.blockSize;
    const owners = new Map();
    for (const [seq, table] of state.tables) for (const block of table) owners.set(block, [...(owners.get(block) ?? []), seq]);
    const touched = new Set([...state.slots.keys()].map((slot) => Math.floor(slot / size)));
    let shown = [...new Set([...touched, ...owners.keys()])].sort((a, b) => a - b);
    if (shown.length > MOST_BLOCKS) shown = shown.filter((block) => owners.has(block)).slice(0, MOST_BLOCKS);
    const boxes = shown.map((block) => {
      const whose = owners.get(block) ?? [];
      const kind = whose.length === 0 ? "fp-free" : whose.length > 1 ? "fp-shared" : color(view, whose[0]);
      // A free block keeps what was written; one that was handed out has of that only what its sequence wrote.
      const valid = whose.map((seq) => state.computed[seq] - state.tables.get(seq).indexOf(block) * size);
      const count = whose.length ? Math.min(Math.max(...valid, 0), size) : size;
      const filled = [...Array(count).keys()].map((i) => block * size + i).filter((slot) => state.slots.has(slot));
      const words = filled.map((slot) => `<span class="fp-slot${state.fresh.has(slot) ? " fp-new" : ""}">${label(view.texts[state.slots.get(slot)])}</span>`);
      const empty = size - filled.length;
      const rest = empty > 8 ? `<span class="fp-slot">${empty} empty</span>` : '<span class="fp-slot">·</span>'.repeat(empty);
      const who = whose.length ? whose.map((seq) => escape(view.nameOf(seq))).join(", ") : "free";
      return `<span class="fp-block ${kind}"><span class="fp-head">block ${block} · ${who}</span>${words.join("")}${rest}</span>`;
    });
    const others = view.run.numBlocks - shown.length;
    const more = others > 0 ? `<p class="fp-title">${plural(others, "more block")}${shown.length < touched.size ? "" : ", never used so far"}.</p>` : "";
    return `${title("Blocks of the cache, and the words in their slots; framed: written in this step")}<div class="fp-flow">${boxes.join("")}</div>${more}`;
  }

  function answers(view, state) {
    const boxes = state.got.map(({ seq, count, bars }) => {
      const { tokens, prompt } = view.run.seqs[seq];
      const text = (from, to) => escape(tokens.slice(from, to).map((token) => view.texts[token]).join(""));
      const end = state.written[seq];
      const from = Math.max(end - count - 16, 0);
      const said = `${from ? "… " : ""}<span class="fp-muted">${text(from, Math.max(prompt, from))}</span>${text(Math.max(prompt, from), end - count)}<mark>${text(end - count, end)}</mark>`;
      const charts = (bars ?? []).map((found, i) => bar(view, found, tokens[end - count + i])).join("");
      return `<span class="fp-text ${color(view, seq)}"><b>${escape(view.nameOf(seq))}</b><span class="fp-said">${said}</span>${charts}</span>`;
    });
    return boxes.length ? `${title("New tokens")}<div class="fp-flow">${boxes.join("")}</div>` : title("No new token in this step");
  }

  function bar(view, found, chosen) {
    return found
      .map(([token, p]) => {
        const hit = token === chosen ? " fp-hit" : "";
        return `<span class="fp-bar${hit}"><span>${label(view.texts[token])}</span><span><span style="width:${100 * p}%"></span></span><span>${p.toFixed(3)}</span></span>`;
      })
      .join("");
  }

  for (const root of document.querySelectorAll('[data-player="PLAYER"]:not([data-step])')) {
    start(root, JSON.parse(root.querySelector('script[type="application/json"]').textContent));
  }
})();
