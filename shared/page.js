// What all pages do: make elements, and play videos in place.
"use strict";

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g", "clipPath", "rect"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const whole = (value) => value.toLocaleString("en-US");

// A video's first frame is fetched when it comes into sight, with a mark on it that says that it can be played. A
// player's buttons are shown while it is pointed at; to a finger, which cannot point, once it plays.
const sight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) { target.preload = "metadata"; sight.unobserve(target); }
}, { rootMargin: "200px" });
const points = matchMedia("(hover: hover)").matches;
for (const video of document.querySelectorAll("video")) {
  const player = make("span", { class: "player" });
  video.replaceWith(player);
  player.append(video);
  video.controls = false;
  if (points) {
    video.onpointerenter = video.onfocus = () => { video.controls = true; };
    video.onpointerleave = video.onblur = () => { video.controls = false; };
  } else video.onclick = () => { if (!video.controls) video.play(); };
  video.onplay = () => { player.classList.add("played"); if (!points) video.controls = true; };
  video.onerror = () => {
    const lost = make("span", { class: "missing" }, "cannot be played");
    lost.title = video.title;
    if (video.hasAttribute("width")) lost.style.aspectRatio = `${video.getAttribute("width")} / ${video.getAttribute("height")}`;
    player.replaceWith(lost);
  };
  video.tabIndex = 0;
  sight.observe(video);
}
for (const button of document.querySelectorAll(".together"))
  button.addEventListener("click", () => {
    const videos = [...button.parentElement.querySelectorAll("video")], playing = videos.some((video) => !video.paused);
    for (const video of videos) if (playing) video.pause(); else { video.currentTime = 0; video.play(); }
    button.textContent = playing ? "play all" : "pause all";
  });
