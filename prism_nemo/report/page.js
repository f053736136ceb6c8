"use strict";
// Everything that this script adds can be done without: tooltips are <title> texts, and every chart has its numbers.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const tip = document.getElementById("tip");
  for (const title of document.querySelectorAll("svg title")) {
    const mark = title.parentNode;
    mark.dataset.tip = title.textContent;
    title.remove(); // or both tooltips would show
  }
  const hide = () => { tip.hidden = true; };
  document.addEventListener("pointermove", (event) => {
    const mark = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    if (!mark) return hide();
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, room)) + "px";
    const below = event.clientY + 18;
    const fits = below + tip.offsetHeight < window.innerHeight;
    tip.style.top = (fits ? below : event.clientY - tip.offsetHeight - 10) + "px";
  });
  document.addEventListener("scroll", hide, { passive: true });

  const button = (text, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.addEventListener("click", () => action(made));
    return made;
  };
  const shown = (value, step) =>
    Math.abs(value) >= 1e6 ? +(value / 1e6).toPrecision(4) + "M"
      : Math.abs(value) >= 1e5 ? +(value / 1e3).toPrecision(4) + "k"
      : value.toLocaleString("en", { maximumFractionDigits: step >= 1 ? 0 : 3 });

  // A line chart: drag across it to zoom, choose the series, go back.
  let charts = 0;
  for (const plot of document.querySelectorAll("svg .plot")) {
    const svg = plot.ownerSVGElement;
    const [low, high, left, right] = plot.dataset.x.split(" ").map(Number);
    const [top, bottom] = plot.dataset.y.split(" ").map(Number);
    const name = svg.getAttribute("aria-label");
    const clip = document.createElementNS(SVG, "clipPath");
    clip.id = "clip-" + charts++;
    const frame = document.createElementNS(SVG, "rect");
    const place = (rect, x, wide) => {
      rect.setAttribute("x", x); rect.setAttribute("width", wide);
      rect.setAttribute("y", top - 6); rect.setAttribute("height", bottom - top + 12);
    };
    place(frame, left - 6, right - left + 12);
    clip.append(frame);
    const holder = document.createElementNS(SVG, "g");
    holder.setAttribute("clip-path", `url(#${clip.id})`);
    plot.replaceWith(holder);
    holder.append(plot);
    svg.prepend(clip);
    const feet = [...svg.querySelectorAll(".x-tick")];
    const first = feet.map((foot) => [foot.getAttribute("x"), foot.textContent]);
    let view = [low, high];
    const controls = document.createElement("div");
    controls.className = "controls";
    controls.setAttribute("role", "group");
    controls.setAttribute("aria-label", "Controls of the chart " + name);
    const look = (from, to) => {
      view = [Math.max(low, from), Math.min(high, to)];
      const zoomed = view[0] > low || view[1] < high;
      const grow = (high - low) / (view[1] - view[0]);
      const at = (value) => left + (right - left) * (value - low) / (high - low);
      plot.setAttribute("transform", `translate(${left - grow * at(view[0])} 0) scale(${grow} 1)`);
      plot.classList.toggle("zoomed", zoomed);
      reset.disabled = !zoomed;
      feet.forEach((foot, number) => {
        const share = (number + 0.5) / feet.length;
        foot.setAttribute("x", zoomed ? left + (right - left) * share : first[number][0]);
        foot.textContent = zoomed ? shown(view[0] + (view[1] - view[0]) * share, (view[1] - view[0]) / feet.length) : first[number][1];
      });
    };
    const middle = (factor) => {
      const half = (view[1] - view[0]) * factor / 2, centre = (view[0] + view[1]) / 2;
      look(centre - half, centre + half);
    };
    const move = (share) => {
      const wide = view[1] - view[0];
      const from = Math.max(low, Math.min(high - wide, view[0] + share * wide));
      look(from, from + wide);
    };
    const names = [...new Set([...plot.querySelectorAll("[data-name]")].map((line) => line.dataset.name))];
    if (names.length > 1) {
      for (const one of names) {
        const choice = button(one, (made) => {
          const on = made.getAttribute("aria-pressed") !== "true";
          made.setAttribute("aria-pressed", on);
          for (const line of plot.querySelectorAll("[data-name]")) {
            if (line.dataset.name === one) line.style.display = on ? "" : "none";
          }
        });
        choice.className = "choice " + plot.querySelector(`[data-name=${CSS.escape(one)}]`).getAttribute("class");
        choice.setAttribute("aria-pressed", "true");
        choice.dir = "auto";
        controls.append(choice);
      }
    }
    const reset = button("Reset zoom", () => look(low, high));
    controls.append(button("Zoom in", () => middle(0.5)), button("←", () => move(-0.5)), button("→", () => move(0.5)), reset);
    for (const [sign, label] of [["←", "Earlier"], ["→", "Later"]]) {
      for (const one of controls.querySelectorAll("button")) if (one.textContent === sign) one.setAttribute("aria-label", label);
    }
    look(low, high);
    svg.closest(".picture").after(controls);

    const band = document.createElementNS(SVG, "rect");
    band.setAttribute("class", "chosen");
    let start = null;
    const position = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      return Math.max(left, Math.min(right, point.x));
    };
    svg.addEventListener("pointerdown", (event) => {
      if (event.button || event.pointerType === "touch") return; // a finger scrolls
      start = position(event);
      svg.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    svg.addEventListener("pointermove", (event) => {
      if (start === null) return;
      const now = position(event);
      place(band, Math.min(start, now), Math.abs(now - start));
      svg.append(band);
      hide();
    });
    const end = (event) => {
      if (start === null) return;
      const [a, b] = [start, position(event)].sort((x, y) => x - y);
      start = null;
      band.remove();
      const wide = view[1] - view[0];
      const value = (x) => view[0] + wide * (x - left) / (right - left);
      if (event.type === "pointerup" && b - a > 6) look(value(a), value(b));
    };
    svg.addEventListener("pointerup", end);
    svg.addEventListener("pointercancel", end);
    svg.addEventListener("dblclick", () => look(low, high));
  }

  // A part of the page that scrolls sideways must be reachable with the keyboard.
  const reach = () => {
    for (const one of document.querySelectorAll(".scroll.picture")) {
      if (one.scrollWidth > one.clientWidth) one.tabIndex = 0; else one.removeAttribute("tabindex");
    }
  };
  reach();
  window.addEventListener("resize", reach);

  // A printed page cannot be clicked: open every table for print, and close them again after.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  window.addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
})();
