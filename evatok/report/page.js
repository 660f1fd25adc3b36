"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

for (const tab of all("[role=tab]")) {
  tab.addEventListener("click", () => {
    for (const other of all("[role=tab]", tab.parentElement)) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", chosen);
      document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
    }
  });
}

for (const chip of all(".legend button")) {
  const views = chip.closest(".views");
  const series = () => all(`.series[data-policy="${CSS.escape(chip.dataset.policy)}"]`, views);
  const emphasise = (on) => {
    views.classList.toggle("dimmed", on);
    for (const group of series()) group.classList.toggle("on", on);
  };
  for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focus", true], ["blur", false]]) {
    chip.addEventListener(event, () => emphasise(on));
  }
  chip.addEventListener("click", () => {
    const shown = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", shown);
    for (const group of series()) group.classList.toggle("off", !shown);
  });
}

const tip = document.getElementById("tip");
document.addEventListener("pointerover", (event) => {
  const target = event.target.closest?.("[data-tip]");
  tip.hidden = !target;
  if (target) tip.textContent = target.dataset.tip;
});
document.addEventListener("pointermove", (event) => {
  if (tip.hidden) return;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const above = event.clientY - tip.offsetHeight - 12;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above < 8 ? event.clientY + 16 : above}px`;
});

const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
for (const strip of all(".strip")) {
  const videos = all("video", strip);
  const [lead, ...followers] = videos;
  const heads = all(".playhead", strip);
  const button = strip.querySelector(".play");
  let wanted = !still;
  let visible = false;
  let following = false;
  const update = () => {
    const playing = wanted && visible;
    button.textContent = wanted ? "pause" : "play";
    for (const video of videos) playing ? video.play().catch(() => {}) : video.pause();
    if (playing && !following) requestAnimationFrame(follow);
  };
  // Separate elements drift apart; the first one is the clock of its strip.
  const follow = () => {
    for (const video of followers) {
      if (Math.abs(video.currentTime - lead.currentTime) > 0.15) video.currentTime = lead.currentTime;
    }
    const share = lead.duration ? lead.currentTime / lead.duration : 0;
    for (const head of heads) {
      head.style.visibility = "visible";
      head.setAttribute("transform", `translate(${share * head.ownerSVGElement.viewBox.baseVal.width} 0)`);
    }
    following = wanted && visible;
    if (following) requestAnimationFrame(follow);
  };
  button.addEventListener("click", () => { wanted = !wanted; update(); });
  new IntersectionObserver(([entry]) => { visible = entry.isIntersecting; update(); }).observe(strip);
}
