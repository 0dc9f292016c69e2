const data = __data__, root = element.querySelector(".hero");
if (!root) return;
const find = (name) => root.querySelector(name), all = (name) => [...root.querySelectorAll(name)];
const slider = find("input"), now = { label: 0, size: data.sizes.length - 1 };
const say = (ratio, one, other) => Math.abs(ratio - 1) < 0.05 ? "about as much" : ratio < 1
  ? `${(100 * (1 - ratio)).toFixed(0)}% ${one}` : `${(100 * (ratio - 1)).toFixed(0)}% ${other}`;
const draw = () => {
  const column = +slider.value, row = now.label * data.seeds.length, last = data.counts.length - 1;
  const side = find(".tile").offsetWidth || 160, count = data.counts[column], size = data.sizes[now.size];
  const place = (tile, x) => { tile.style.backgroundPosition = `${-x * side}px ${-row * side}px`; };
  all(".tile.own").forEach((tile) => place(tile, column));
  all(".tile.most").forEach((tile) => place(tile, last));
  const name = `${count} mediator${count > 1 ? "s" : ""}`;
  find("output").textContent = count;
  find(".own-name").textContent = name;
  const error = data.errors[now.label][0][column];
  find(".apart").textContent = error ? `difference, 4 times as bright; error ${error.toFixed(3)}` : "no difference";
  const end = size.gflop.length - 1, flops = size.gflop[column] / size.gflop[end];
  const time = size.milliseconds[column] / size.milliseconds[end];
  find(".flops").style.width = `${100 * flops}%`;
  find(".time").style.width = `${100 * time}%`;
  const numbers = (list, unit) => `: ${list[column].toLocaleString("en", { maximumSignificantDigits: 3 })} instead of ` +
    `${list[end].toLocaleString("en", { maximumSignificantDigits: 3 })} ${unit}`;
  find(".flops-text").textContent = say(flops, "saved", "more") + numbers(size.gflop, "GFLOP");
  find(".time-text").textContent = say(time, "saved", "more") + numbers(size.milliseconds, "ms");
  const code = `SiTPipeline.from_pretrained("attngen/assets/emoji_128")("${data.classes[now.label]}", num_mediators=${count})`;
  find(".line1").textContent = code;
  all(".classes button").forEach((button, i) => button.setAttribute("aria-checked", i === now.label));
  all(".sizes button").forEach((button, i) => button.setAttribute("aria-checked", i === now.size));
};
slider.addEventListener("input", draw);
all(".classes button").forEach((button, i) => button.addEventListener("click", () => { now.label = i; draw(); }));
all(".sizes button").forEach((button, i) => button.addEventListener("click", () => { now.size = i; draw(); }));
find(".live").addEventListener("click", () => trigger("submit", {
  label: data.classes[now.label], seed: data.seeds[0], mediators: data.counts[+slider.value] }));
find(".copy").addEventListener("click", (event) => {
  navigator.clipboard?.writeText("from attngen import SiTPipeline\n" + find(".line1").textContent + ".images[0]");
  event.target.textContent = "Copied";
});
addEventListener("resize", draw);
draw();
