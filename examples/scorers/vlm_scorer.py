# SPDX-License-Identifier: Apache-2.0
"""A vision-language model as a scorer of images: how sure it is that the image shows the prompt.

It asks a server that speaks OpenAI's chat protocol and gives log-probabilities, such as vLLM's:

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 9000
    python -m trl_sipo.rewards.outside.serve examples.scorers.vlm_scorer:YesNoScore --stdio

The score is P(yes) / (P(yes) + P(no)) of the first token of the answer, after VQAScore (Lin et al., 2404.01291), whose
own models and question differ. Needs the standard library alone. **It has not been run with a real model here.**
"""

import base64
import json
import math
import os
import urllib.request
from concurrent.futures import ThreadPoolExecutor

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
QUESTION = 'Does this image show "{}"? Answer with Yes or No.'


class YesNoScore:
    """A probability for each image. A key, if the server wants one, is the variable `VLM_API_KEY`."""

    def __init__(self, model=MODEL, url="http://127.0.0.1:9000/v1", question=QUESTION, at_once=8, timeout=120):
        self.model, self.url, self.question, self.at_once, self.timeout = model, url, question, at_once, timeout
        self.info = {
            "name": f"yes_no_{model.rpartition('/')[2]}",
            "convention": f"P(yes) / (P(yes) + P(no)) for: {question}",
            "licence": f"that of {model}",
            "media": ["image"],
            "batch_size": 4 * at_once,
            "identity": {"model": model, "question": question},
        }

    def score(self, paths, prompts):
        """The probability of "yes" for each image file."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self._score_one, paths, prompts))

    def _score_one(self, path, prompt):
        with open(path, "rb") as file:
            image = "data:image/png;base64," + base64.b64encode(file.read()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": self.question.format(prompt)},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        if os.environ.get("VLM_API_KEY"):  # not sent on to where a server redirects to
            request.add_unredirected_header("Authorization", f"Bearer {os.environ['VLM_API_KEY']}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = json.load(response)
        return probability_of_yes(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"])


def probability_of_yes(tokens):
    """P(yes) / (P(yes) + P(no)) of the likeliest tokens, in any spelling.

    Raises:
        RuntimeError: neither is among them: the model does not answer the question.
    """
    mass = {"yes": 0.0, "no": 0.0}
    for token in tokens:
        word = token["token"].strip().lower()
        if word in mass:
            mass[word] += math.exp(token["logprob"])
    if not sum(mass.values()):
        raise RuntimeError(f"no yes or no among {[token['token'] for token in tokens]}")
    return mass["yes"] / sum(mass.values())
