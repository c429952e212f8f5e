"use strict";
// Draws each figure from the specification beside it.
for (const place of document.querySelectorAll("[data-figure]")) {
  const spec = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  // As a syntax tree: the page's policy allows no code made from text.
  const options = {
    actions: false, ast: true, defaultStyle: false, renderer: "svg",
    tooltip: { disableDefaultStyle: true },
  };
  vegaEmbed(place, spec, options).then(
    () => { place.dataset.drawn = "yes"; },
    (error) => { place.textContent = "This picture could not be drawn: " + error; throw error; },
  );
}
