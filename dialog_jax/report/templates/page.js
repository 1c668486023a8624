// The page as a whole: the theme, and which of overview and dialogue is shown.
"use strict";

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = `Theme: ${theme}`;
  redrawCharts();
}

let overviewScroll = 0;

async function route() {
  const match = location.hash.match(/^#\/dialogue\/(\d+)$/);
  const overview = document.getElementById("overview");
  const article = document.getElementById("dialogue");
  hideCard();
  if (match && Number(match[1]) < report.dialogues.length) {
    if (!overview.hidden) overviewScroll = scrollY;
    await openDialogue(Number(match[1]));
    overview.hidden = true;
    article.hidden = false;
    showLayout(); // positions need what is visible
    scrollTo({ top: 0, behavior: "instant" });
    document.getElementById("dialogue-heading").focus({ preventScroll: true });
    return;
  }
  const wasDialogue = !article.hidden;
  article.hidden = true;
  overview.hidden = false;
  if (chartsAreStale) redrawCharts();
  if (wasDialogue && location.hash === "#dialogues") scrollTo({ top: overviewScroll, behavior: "instant" });
  else if (location.hash.length > 1) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

document.getElementById("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme ?? "auto";
  setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
addEventListener("hashchange", route);

prepareList();
prepareCharts();
setTheme("auto");
route();
