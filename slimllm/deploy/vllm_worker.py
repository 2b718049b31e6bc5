"""Asks vLLM about one model: ``python vllm_worker.py REQUEST.json ANSWER.json``.

Runs in vLLM's own environment, by the interpreter of that, so it imports nothing of this project. REQUEST holds ``model`` (a folder),
``dtype``, ``context``, ``trust_remote_code``, and any of these queries: ``text`` to tokenize, ``prompts`` (token ids) to take
log-probabilities of, ``greedy`` (prompt, tokens, banned ids) and ``speed`` (prompt tokens, new tokens, repeats). ANSWER holds the
results by the same names.
"""

import json
import statistics
import sys
import time


def main(request_path, answer_path):
    """Reads the request, loads the model, and writes the answer; whatever vLLM raises ends the process with a traceback."""
    from vllm import LLM, SamplingParams

    with open(request_path) as file:
        request = json.load(file)
    settings = {name: request[name] for name in ("model", "dtype", "trust_remote_code")}
    llm = LLM(**settings, max_model_len=request["context"], enforce_eager=True, enable_prefix_caching=False, seed=0)

    def generate(ids, **sampling):
        (output,) = llm.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, **sampling), use_tqdm=False)
        return output

    answer = {}
    if "text" in request:
        answer["text"] = list(llm.get_tokenizer().encode(request["text"]))
    if "prompts" in request:
        answer["prompts"] = []
        for ids in request["prompts"]:
            log_probabilities = generate(ids, max_tokens=1, prompt_logprobs=0).prompt_logprobs
            answer["prompts"].append([entry[token].logprob for token, entry in zip(ids[1:], log_probabilities[1:])])
    if "greedy" in request:
        prompt, tokens, banned = request["greedy"]
        never = {token: -100.0 for token in banned}
        output = generate(prompt, max_tokens=tokens, ignore_eos=True, logit_bias=never)
        answer["greedy"] = list(output.outputs[0].token_ids)
    if "speed" in request:
        length, new_tokens, repeats = request["speed"]
        prompt = [3 + i % 50 for i in range(length)]

        def seconds(tokens):
            started = time.perf_counter()
            generate(prompt, max_tokens=tokens, ignore_eos=True)
            return time.perf_counter() - started

        seconds(2)  # warms up
        runs = [(seconds(1), seconds(1 + new_tokens)) for _ in range(repeats)]
        first = statistics.median(short for short, _ in runs)
        answer["speed"] = [length / first, new_tokens / (statistics.median(whole for _, whole in runs) - first)]
    with open(answer_path, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file again
    main(*sys.argv[1:])
