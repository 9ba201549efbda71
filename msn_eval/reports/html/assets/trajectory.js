"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panels = [...document.querySelectorAll(".panel")].map((panel, number) => ({
    svg: panel.querySelector("svg"), cursor: panel.querySelector(".cursor"),
    keys: [...panel.querySelectorAll(".key b")].map((key) => ({ key, last: key.textContent })),
    curves: data.panels[number],
  }));

  // The point of a curve that is nearest to x.
  const nearest = (curve, x) => {
    let low = 0, high = curve.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (curve[middle][0] < x) low = middle; else high = middle;
    }
    return Math.abs(curve[low][0] - x) <= Math.abs(curve[high][0] - x) ? curve[low] : curve[high];
  };

  // Show the same x in all panels.
  const show = (x) => panels.forEach(({ svg, cursor, keys, curves }) => {
    const { left, right } = svg.dataset, at = Number(left) + (x / data.end) * (right - left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    keys.forEach(({ key }, number) => {
      const [where, value] = nearest(curves[number], x);
      key.textContent = `${value} at ${data.unit} ${Number(where.toPrecision(4))}`;
    });
  });
  const hide = () => panels.forEach(({ cursor, keys }) => {
    cursor.setAttribute("visibility", "hidden");
    keys.forEach(({ key, last }) => { key.textContent = last; });
  });
  panels.forEach(({ svg }) => {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), { left, right } = svg.dataset;
      const svgX = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      show(Math.max(0, Math.min(1, (svgX - left) / (right - left))) * data.end);
    });
    svg.addEventListener("pointerleave", hide);
  });
})();
