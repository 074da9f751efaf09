"""How the page looks: on phones and laptops, in light and in dark."""

from __future__ import annotations

import gradio as gr

FONTS = (
    "-apple-system BlinkMacSystemFont Segoe_UI Roboto PingFang_SC Microsoft_YaHei "
    "Noto_Sans_CJK_SC Noto_Sans sans-serif"
)
MONO = "ui-monospace SFMono-Regular Menlo Consolas monospace"
CSS = """
.gradio-container { width: 100% !important; max-width: 1160px !important; margin: 0 auto; }
#head { align-items: baseline; flex-wrap: nowrap; }
#title h1 { font-size: 1.5rem; letter-spacing: -.015em; margin: 0; }
#title p { color: var(--body-text-color-subdued); margin: .1rem 0 0; }
#language { flex: 0 0 auto !important; min-width: 0 !important; width: auto !important; }
#language a { color: var(--link-text-color); padding: .6rem .2rem; }
#language, #served, #shares { padding: 0 !important; }
#served p { color: var(--body-text-color-subdued); font-size: .8rem; margin: 0;
  overflow-wrap: anywhere; }
#note:not(:has(p)) { display: none; }
#note p { color: var(--error-text-color); margin: 0; }
#chat { height: max(320px, calc(100vh - 250px)) !important; }
#chat .message img { max-width: 200px; max-height: 160px; width: auto; }
#chat .message-buttons { display: none; }
#chat .component .image-frame { height: auto; width: auto; }
#ask { align-items: stretch; }
#question textarea { font-size: 1rem; }
#send, #stop, #restart { min-width: 6.5rem; white-space: nowrap; }
.gradio-container :is(a, button, input, textarea):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
#shares h2 { font-size: 1rem; margin: 0 0 .5rem; }
#shares ol { list-style: none; margin: 0; padding: 0; }
#shares li { display: grid; grid-template-columns: 1fr auto; gap: .15rem .8rem; margin: 0 0 .7rem;
  overflow-wrap: anywhere; }
#shares i { grid-column: 1 / -1; height: .5rem; min-width: 2px; border-radius: .25rem;
  background: var(--color-accent); }
#shares small { color: var(--body-text-color-subdued); }
@media (max-width: 640px) {
  #picture, #picture .image-container { height: 220px !important; }
  #chat { height: 44vh !important; }
  #left, #right { display: contents; }
  #settings { order: 1; } /* below the conversation */
}
"""


def theme() -> gr.themes.Base:
    """gradio's Soft with fonts that are on the reader's own machine."""
    return gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=[gr.themes.Font(name.replace("_", " ")) for name in FONTS.split()],
        font_mono=[gr.themes.Font(name) for name in MONO.split()],
    ).set(
        # Soft's own greys are too light to read for many eyes (under 4.5 : 1).
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        input_border_color="*neutral_300",
        block_label_background_fill="*block_background_fill",
        block_label_background_fill_dark="*block_background_fill",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        block_title_background_fill="transparent",
        block_title_text_color="*body_text_color_subdued",
        block_title_text_color_dark="*body_text_color_subdued",
        block_title_padding="0",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_label_border_width="0",
        block_label_border_width_dark="0",
        block_shadow="none",
        input_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
