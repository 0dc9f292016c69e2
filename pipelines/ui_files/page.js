// Ctrl+Enter starts and Esc stops whatever the visible tab has; pictures in buttons have names; tabs have addresses;
// a PNG may be dropped anywhere; what happens is read out.
document.addEventListener("keydown", (event) => {
  const press = (kind) => {
    const found = [...document.querySelectorAll("button." + kind)].find((b) => b.offsetParent && !b.disabled);
    if (found) { event.preventDefault(); found.click(); }
  };
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    document.activeElement.dispatchEvent(new Event("change", { bubbles: true }));
    setTimeout(() => press("start-button"), 60);
  }
  if (event.key === "Escape") press("stop-button");
});
const tabs = () => [...document.querySelectorAll("button[role=tab]")];
const nameOf = (tab) => "#" + tab.innerText.trim().toLowerCase();
const showTab = () => tabs().find((tab) => nameOf(tab) === (location.hash || "#generate"))?.click();
addEventListener("popstate", showTab);
document.addEventListener("click", (event) => {
  const tab = event.target.closest?.("button[role=tab]");
  if (tab && nameOf(tab) !== (location.hash || "#generate")) history.pushState(null, "", nameOf(tab));
  if (!event.target.closest?.("#generate")) return;
  const output = document.querySelector("#output"), top = output.getBoundingClientRect().top;
  if (top < 0 || top > innerHeight / 2) output.scrollIntoView({ behavior: "smooth" });
});
// A bar of the schedule: up and down changes its count, its left edge the time from which it holds.
document.addEventListener("pointerdown", (event) => {
  const bar = event.target.closest?.("#timeline .bar");
  const field = [...document.querySelectorAll("[id^=options-] :is(textarea, input)")]
    .find((found) => found.offsetParent && /^[\d.:,\s]+$/.test(found.value));
  if (!bar || !field) return;
  const bars = [...bar.parentElement.children], number = bars.indexOf(bar), box = bar.parentElement.getBoundingClientRect();
  const pairs = field.value.includes(":") ? field.value.split(",").map((p) => p.split(":").map(Number)) : [[1, +field.value]];
  if (pairs.length !== bars.length) return;
  const isEdge = number > 0 && event.clientX - bar.getBoundingClientRect().left < 14, count = pairs[number][1];
  const move = (now) => {
    const time = Math.round(100 * (1 - (now.clientX - box.left) / box.width)) / 100;
    if (isEdge) {
      const later = pairs[number + 1]?.[0] ?? 0;
      pairs[number][0] = Math.min(pairs[number - 1][0] - 0.02, Math.max(later + 0.02, time)).toFixed(2) * 1;
    } else pairs[number][1] = Math.max(1, Math.round(count * 2 ** ((event.clientY - now.clientY) / 40)));
    field.value = pairs.length > 1 ? pairs.map((pair) => pair.join(":")).join(",") : String(pairs[0][1]);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  document.addEventListener("pointermove", move);
  document.addEventListener("pointerup", () => document.removeEventListener("pointermove", move), { once: true });
  event.preventDefault();
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  const file = event.dataTransfer?.files[0], input = document.querySelector("#more > input[type=file]");
  if (event.target.closest?.("input[type=file]") || !file || !input) return;
  event.preventDefault();
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
// Buttons that hold nothing but a picture get the name of their part or caption, for those who cannot see it.
let opened = false, last = "";
new MutationObserver(() => {
  for (const image of document.querySelectorAll("button img")) {
    const button = image.closest("button"), caption = button.querySelector(".caption-label")?.textContent.trim();
    const part = image.closest(".block")?.querySelector("[data-testid=block-label]")?.textContent.trim();
    const name = caption || (button.matches(":not([aria-label])") && (part || "picture"));
    if (name && button.getAttribute("aria-label") !== name) button.setAttribute("aria-label", name);
  }
  if (!opened && tabs().length) { opened = true; if (location.hash) setTimeout(showTab, 100); }
}).observe(document, { childList: true, subtree: true });
setInterval(() => {
  const line = [...document.querySelectorAll(".line textarea")].find((l) => l.offsetParent)?.value ?? "";
  const spoken = line.split(":")[0];
  if (spoken === last) return;
  last = spoken;
  let region = document.querySelector("#spoken");
  if (!region) {
    region = Object.assign(document.createElement("div"), { id: "spoken", role: "status" });
    document.body.append(region);
  }
  region.textContent = line;
}, 1000);
