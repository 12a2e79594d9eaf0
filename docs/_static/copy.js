// SPDX-License-Identifier: Apache-2.0
// A button on every block of code that copies its text; none on formulas and outputs, which have no language. Without a
// clipboard (plain http) no button is shown.
document.addEventListener("DOMContentLoaded", () => {
  if (!navigator.clipboard) return;
  for (const block of document.querySelectorAll("article div.highlight > pre")) {
    if (block.closest(".highlight-none")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.setAttribute("aria-label", "Copy this code");
    button.addEventListener("click", async () => {
      const text = block.cloneNode(true);
      text.querySelectorAll(".linenos").forEach((number) => number.remove());
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Not allowed";
      }
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    block.parentElement.append(button);
  }
});
