// What both demos show: pictures that went through both exits, and a slider that chooses between
// them. Nothing is computed here but which exit a picture leaves at.
//
// A set, as `show` takes it:
//   classes       names
//   threshold     the detector's own
//   difficulties  of its calibration, or none
//   gflops        of each exit, or null
//   pictures      name, src, width, height, difficulty, seconds of each exit, and of each exit
//                 boxes (left, top, right, bottom), scores and labels
//   faults        sentences about what could not be read
globalThis.DynamicViewer = (() => {
  const KINDS = {threshold: 'Threshold', share: 'Hard share', milliseconds: 'Milliseconds'};
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const clamp = (value) => Math.min(1, Math.max(0, value));

  // As threshold_for of standalone_runtime.py, digit by digit.
  function thresholdForShare(difficulties, share) {
    const known = Float32Array.from(difficulties).sort();
    const cuts = [0];
    for (let at = 1; at < known.length; at++) if (known[at] > known[at - 1]) cuts.push(at);
    if (known.length) cuts.push(known.length);
    const wanted = (1 - share) * known.length;
    let easy = cuts[0];
    for (const cut of cuts) if (Math.abs(cut - wanted) < Math.abs(easy - wanted)) easy = cut;
    if (easy === 0) return -1;
    if (easy === known.length) return 1;
    const middle = Math.fround(Math.fround(known[easy - 1] + known[easy]) / 2);
    return known[easy - 1] <= middle && middle < known[easy] ? middle : known[easy - 1];
  }

  const meanSeconds = (set, exit) => mean(set.pictures.map((picture) => picture.seconds[exit]));

  // The difficulty above which pictures are hard, for a kind of budget and its value.
  function thresholdFor(set, kind, value) {
    if (kind === 'threshold') return value;
    const own = set.pictures.map((picture) => picture.difficulty);
    const known = set.difficulties.length ? set.difficulties : own;
    if (kind === 'share') return thresholdForShare(known, value);
    const [low, high] = [0, 1].map((exit) => 1000 * meanSeconds(set, exit));
    return thresholdForShare(known, high > low ? clamp((value - low) / (high - low)) : 1);
  }

  const exitAt = (picture, threshold) => +(picture.difficulty > Math.fround(threshold));

  function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    // Names of classes and files are text, whatever is in them.
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function drawBoxes(frame, set, picture, exit, lowest) {
    const {boxes, scores, labels} = picture.exits[exit];
    let count = 0;
    // The best last, over the others.
    for (let row = boxes.length - 1; row >= 0; row--) {
      if (scores[row] < lowest) continue;
      const [left, top, right, bottom] = boxes[row];
      const box = element('div', 'dd-box');
      const percent = (value, side) => `${(100 * value) / side}%`;
      Object.assign(box.style, {
        left: percent(left, picture.width),
        top: percent(top, picture.height),
        width: percent(right - left, picture.width),
        height: percent(bottom - top, picture.height),
      });
      box.style.setProperty('--hue', (labels[row] * 137.5) % 360);
      Object.assign(box.dataset, {box: boxes[row], score: scores[row], label: labels[row]});
      const name = set.classes[labels[row]] ?? labels[row];
      const tag = element('span', '', `${name} ${scores[row].toFixed(2)}`);
      // Inside the picture at its edges.
      if (top < 0.06 * picture.height) tag.classList.add('dd-below');
      if (left > 0.7 * picture.width) tag.classList.add('dd-left');
      box.append(tag);
      frame.append(box);
      count++;
    }
    return count;
  }

  function panel(set, picture, exit, lowest, title, isChosen) {
    const figure = element('figure', isChosen ? 'dd-panel dd-is-chosen' : 'dd-panel');
    figure.dataset.exit = exit;
    const frame = element('div', 'dd-frame');
    frame.style.setProperty('--aspect', picture.width / picture.height);
    const image = element('img');
    image.src = picture.src;
    image.alt = picture.name;
    frame.append(image);
    const count = drawBoxes(frame, set, picture, exit, lowest);
    const caption = element('figcaption');
    caption.append(element('strong', '', title));
    const objects = count === 1 ? '1 object' : `${count} objects`;
    const cost = `${(1000 * picture.seconds[exit]).toFixed(1)} ms`;
    caption.append(` ${objects}, ${cost}`);
    figure.append(frame, caption);
    return figure;
  }

  function mount(root) {
    root.replaceChildren();
    root.classList.add('dd');
    let set = null, kind = 'threshold', value = null, lowest = 0.3, selected = 0;

    const controls = element('div', 'dd-controls');
    const kinds = element('div', 'dd-kinds');
    kinds.setAttribute('role', 'group');
    kinds.setAttribute('aria-label', 'Budget');
    const buttons = {};
    for (const [name, text] of Object.entries(KINDS)) {
      buttons[name] = element('button', '', text);
      buttons[name].type = 'button';
      buttons[name].dataset.kind = name;
      buttons[name].addEventListener('click', () => choose(name));
      kinds.append(buttons[name]);
    }
    const [budget, budgetValue, budgetLine] = slider('dd-budget', 'Budget');
    const [score, scoreValue, scoreLine] = slider('dd-score', 'Lowest score');
    Object.assign(score, {min: 0, max: 1, step: 0.05, value: lowest});
    controls.append(kinds, budgetLine, scoreLine);
    const summary = element('p', 'dd-summary');
    summary.setAttribute('aria-live', 'polite');
    const faults = element('ul', 'dd-faults');
    const strip = element('div', 'dd-strip');
    const panels = element('div', 'dd-panels');
    root.append(faults, controls, summary, strip, panels);

    function slider(name, text) {
      const line = element('label', 'dd-line'), input = element('input', name);
      const output = element('output');
      input.type = 'range';
      line.append(element('span', '', text), input, output);
      return [input, output, line];
    }

    const milliseconds = () => [0, 1].map((exit) => 1000 * meanSeconds(set, exit));

    // Another kind of budget, at the value that the old threshold has in it, as near as may be.
    function choose(name) {
      const threshold = thresholdFor(set, kind, value);
      const share = mean(set.pictures.map((picture) => exitAt(picture, threshold)));
      const [low, high] = milliseconds();
      kind = name;
      value = {threshold, share, milliseconds: low + share * (high - low)}[name];
      settle();
    }

    // The slider, as far as it goes for these pictures.
    function settle() {
      const [low, high] = kind === 'milliseconds' ? milliseconds() : [0, 1];
      value = Math.min(Math.max(high, low), Math.max(low, value));
      Object.assign(budget, {min: low, max: Math.max(high, low), step: 'any'});
      budget.value = value;
      draw();
    }

    function draw() {
      const threshold = thresholdFor(set, kind, value);
      const exits = set.pictures.map((picture) => exitAt(picture, threshold));
      const hard = exits.reduce((sum, exit) => sum + exit, 0);
      root.dataset.threshold = threshold;
      for (const [name, button] of Object.entries(buttons)) {
        button.setAttribute('aria-pressed', name === kind);
      }
      budgetValue.textContent = kind === 'milliseconds' ? `${value.toFixed(1)} ms`
        : kind === 'share' ? `${Math.round(100 * value)} %` : value.toFixed(2);
      scoreValue.textContent = lowest.toFixed(2);
      const seconds = mean(set.pictures.map((picture, at) => picture.seconds[exits[at]]));
      const ends = [0, 1].map((exit) => (1000 * meanSeconds(set, exit)).toFixed(1));
      const parts = [
        `${hard} of ${exits.length} hard`,
        `mean ${(1000 * seconds).toFixed(1)} ms (exit 0: ${ends[0]}, exit 1: ${ends[1]})`,
      ];
      if (set.gflops) {
        parts.push(`${mean(exits.map((exit) => set.gflops[exit])).toPrecision(3)} GFLOPs`);
      }
      if (kind !== 'threshold') parts.push(`threshold ${threshold.toFixed(3)}`);
      if (kind !== 'threshold' && !set.difficulties.length) {
        parts.push('not calibrated: shares are of these pictures');
      }
      summary.textContent = parts.join(' · ');
      [...strip.children].forEach((thumb, at) => {
        thumb.dataset.exit = exits[at];
        thumb.setAttribute('aria-pressed', at === selected);
        thumb.lastChild.textContent = exits[at] ? 'hard' : 'easy';
      });
      const picture = set.pictures[selected], exit = exits[selected];
      const title = `${exit ? 'Hard' : 'Easy'}, difficulty ${picture.difficulty.toFixed(3)}: exit ${exit}.`;
      const chosen = panel(set, picture, exit, lowest, title, false);
      chosen.classList.add('dd-chosen');
      const both = element('div', 'dd-both');
      for (const one of [0, 1]) {
        both.append(panel(set, picture, one, lowest, `Exit ${one}.`, one === exit));
      }
      panels.replaceChildren(chosen, both);
    }

    budget.addEventListener('input', () => { value = +budget.value; draw(); });
    score.addEventListener('input', () => { lowest = +score.value; draw(); });

    function show(shown) {
      set = shown;
      faults.replaceChildren(...set.faults.map((fault) => element('li', '', fault)));
      faults.hidden = !set.faults.length;
      const empty = !set.pictures.length;
      for (const part of [controls, summary, strip, panels]) part.hidden = empty;
      root.dataset.pictures = set.pictures.length;
      if (empty) return;
      selected = 0;
      strip.hidden = set.pictures.length < 2;
      strip.replaceChildren(...set.pictures.map((picture, at) => {
        const thumb = element('button', 'dd-thumb'), image = element('img');
        thumb.type = 'button';
        thumb.title = picture.name;
        image.src = picture.src;
        image.alt = picture.name;
        thumb.append(image, element('span'));
        thumb.addEventListener('click', () => { selected = at; draw(); });
        return thumb;
      }));
      value ??= set.threshold;
      settle();
    }

    return {show};
  }

  return {mount, thresholdFor, thresholdForShare};
})();
