"use strict";
// The horizontal axis of all charts.
for (const button of document.querySelectorAll(".axis button")) {
  button.addEventListener("click", () => {
    document.body.dataset.axis = button.dataset.axis;
    for (const other of document.querySelectorAll(".axis button"))
      other.setAttribute("aria-pressed", String(other.dataset.axis === button.dataset.axis));
  });
}
// The values below the pointer.
for (const panel of document.querySelectorAll(".panel")) {
  const plot = panel.querySelector(".plot"), tip = plot.querySelector(".tip"), cursor = plot.querySelector(".cursor");
  const series = JSON.parse(panel.querySelector("script").textContent);
  const hide = () => { tip.classList.remove("on"); cursor.classList.remove("on"); };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect(), at = 100 * (event.clientX - box.left) / box.width;
    const rows = [];
    for (const one of series) {
      let best = 0;
      for (let i = 1; i < one.x.length; i++) if (Math.abs(one.x[i] - at) < Math.abs(one.x[best] - at)) best = i;
      rows.push({ one, best, away: Math.abs(one.x[best] - at) });
    }
    const nearest = Math.min(...rows.map((row) => row.away));
    const near = rows.filter((row) => row.away <= Math.max(nearest, 1.5));
    if (!near.length) return hide();
    const first = near.reduce((a, b) => (b.away < a.away ? b : a));
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: first.one.cost[first.best] }));
    for (const { one, best } of near) {
      const row = document.createElement("div"), key = document.createElement("i");
      key.className = "key t" + one.tone;
      row.append(key, one.value[best] + "  " + one.name);
      tip.append(row);
    }
    const left = first.one.x[first.best];
    cursor.style.left = left + "%";
    tip.style.left = left < 50 ? `calc(${left}% + .6rem)` : "auto";
    tip.style.right = left < 50 ? "auto" : `calc(${100 - left}% + .6rem)`;
    tip.classList.add("on"); cursor.classList.add("on");
  });
}
// Previews over time; several runs move together, each over its own previews.
for (const film of document.querySelectorAll(".film")) {
  const input = film.querySelector("input"), play = film.querySelector(".play");
  if (!input) continue;
  const show = () => {
    for (const frames of film.querySelectorAll(".frames")) {
      const all = [...frames.querySelectorAll(".frame")];
      const chosen = Math.round((all.length - 1) * input.value / input.max);
      all.forEach((frame, number) => frame.classList.toggle("on", number === chosen));
    }
  };
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶"; play.setAttribute("aria-label", "Play"); };
  input.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (input.value === input.max) input.value = 0;
    show();
    play.textContent = "❚❚"; play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => {
      input.value = Number(input.value) + 1;
      show();
      if (input.value === input.max) stop();
    }, 500);
  });
}
