"""How the page looks, and its two keys."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { width: 100% !important; max-width: 1360px !important; margin: 0 auto !important; }
.gradio-container, .gradio-container main { box-sizing: border-box; min-width: 0 !important; }
.gradio-container main { width: 100%; padding: 1rem !important; }
#title h1 { margin: 0; }
.tiny-pictures img { image-rendering: pixelated; }
/* Classes: small pictures in rows of seven under the label, which would cover the first ones. */
#labels { height: auto !important; min-height: 0 !important; }
#labels .grid-wrap { height: auto !important; min-height: 0 !important; max-height: 13rem; }
/* All pictures in view, however many. */
#gallery { min-height: 340px; height: auto !important; }
#gallery .grid-wrap { height: auto !important; max-height: none !important; }
#files .file-preview-holder { max-height: 14rem; overflow-y: auto; }
#labels .grid-wrap, #gallery .grid-wrap, #side .grid-wrap, #history .grid-wrap { padding-top: 1.9rem; }
#labels .grid-container { grid-template-rows: none !important; grid-auto-rows: min-content !important;
  height: auto !important; grid-template-columns: repeat(7, minmax(0, 1fr)) !important;
  gap: 0.25rem; padding: 0.25rem; }
#labels .thumbnail-lg { min-width: 0; width: 100%; height: auto; }
#labels .caption-label { font-size: 0.65rem; padding: 0 0.2rem; line-height: 1.3; }
#status textarea, #compare-status textarea, #calibrate-status textarea { font-variant-numeric: tabular-nums; }
@media (max-width: 768px) {
  /* One column: what was drawn comes right under the buttons. */
  #left, #right { display: contents; }
  #columns { flex-direction: column; }
  #choice { order: 1; } #buttons { order: 2; } #output { order: 3; } #more { order: 4; }
  #labels .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)) !important; }
  #labels .grid-wrap { max-height: 16rem; }
  #table table { min-width: 64rem; } /* it scrolls */
  #gallery .grid-container:has(> :only-child) { grid-template-columns: 1fr !important; }
  .gradio-container main { padding: 0.5rem !important; }
}
"""

# Ctrl+Enter starts and Esc stops whatever the visible tab has; pictures in buttons have names.
HEAD = """
<script>
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
// Buttons that hold nothing but a picture get the name of their part, for those who cannot see it.
new MutationObserver(() => {
  for (const image of document.querySelectorAll("button:not([aria-label]) .image-frame img")) {
    const part = image.closest(".block")?.querySelector("[data-testid=block-label]");
    image.closest("button").setAttribute("aria-label", part?.textContent.trim() || "picture");
  }
}).observe(document, { childList: true, subtree: true });
</script>
"""


def theme() -> Any:
    """Gradio's own with fonts that it brings along whole; nothing is fetched from elsewhere."""
    import gradio as gr

    sans = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    mono = gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700))
    return gr.themes.Default(
        primary_hue="indigo",
        font=(sans, "ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=(mono, "ui-monospace", "monospace"),
    ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")  # as dark as reading needs
