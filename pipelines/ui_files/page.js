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
