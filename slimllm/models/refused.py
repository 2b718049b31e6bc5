"""The model types of transformers that are not pruned, each with the reason, and the models of text and images, sound or film whose text
model is read. With the family table they are all causal types and wrappers of the transformers that the tests run with.
"""

from __future__ import annotations

_NOT_TRIED = "not tried: nobody has compared what a row of the table would compute with what its class computes"

_REASONS = {  # why -> model types
    "its projections are stored transposed (Conv1D), where rows and columns are those of a Linear everywhere here": (
        *("gpt2", "gpt-sw3", "openai-gpt"),
    ),
    "its files hold the output head under another name (embed_out) than its class has, and are read here by the class's names": (
        *("gpt_neox", "gpt_neox_japanese"),
    ),
    "its queries, keys and values lie in one projection, head by head, and its class derives the size of a head from their number": (
        *("falcon", "bloom", "persimmon"),
    ),
    "its config names the sizes of a layer in a way of its own, and no such family has been verified yet": (
        *("gptj", "opt", "mpt", "gpt_bigcode", "gpt_neo", "codegen", "xglm", "ctrl", "cpmant", "dbrx"),
    ),
    "an encoder, or the decoder of an encoder-decoder model: its layers are built to read another sequence as well": (
        *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert", "data2vec-text"),
        *("electra", "ernie", "marian", "mbart", "megatron-bert", "mvp", "pegasus", "plbart", "prophetnet", "rembert", "roberta"),
        *("roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
        *("florence2", "pix2struct", "t5gemma2", "udop", "vision-encoder-decoder", "pp_formulanet", "blip", "kosmos-2", "kosmos-2.5"),
    ),
    "a state space or recurrence only: it has no attention, and no feed-forward part to cut": (
        *("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
    ),
    "its layers share one block of attention and feed-forward part": ("zamba", "zamba2"),
    "its router scales what its experts read, and not what they give": ("llama4_text",),
    "some of its layers route tokens by their ids, and not by what they have come to": ("deepseek_v4",),
    "its layers hand on several states, each foretold and corrected from one of them (AltUp), where others have one": ("gemma3n_text",),
    "it fills blocks of tokens in several rounds, and foretells no next token": ("diffusion_gemma_text",),
    "a draft of another model, whose keys and values it reads": ("gemma4_assistant", "gemma4_unified_assistant"),
    "what is added to its residual stream is added to the normed states": ("minimax",),
    "its layers hand on to the next ones which tokens their attention looks at": ("glm_moe_dsa", "mistral_large4_text"),
    "its config has numbers of heads per layer, by the names that pruned models have for theirs": ("laguna",),
    "each of its layers has two attentions and two feed-forward parts beside its experts": ("longcat_flash",),
    "its attention is a mixture of experts itself": ("jetmoe",),
    "a norm of all channels together lies before the output projection of its feed-forward part": ("bitnet",),
    "what a pair of its heads gives is subtracted and normed together": ("diffllama",),
    "some of its layers attend to images": ("mllama_text_model", "mllama", "git", "idefics", "evolla"),
    "several models of which each writes a part of what the others read: bytes, sound or images": (
        *("blt", "moshi", "musicgen", "musicgen_melody", "kyutai_speech_to_text", "qwen2_5_omni", "qwen3_omni_moe", "pi0", "chameleon"),
        *("nemo_speechlm", "phi4_multimodal"),
    ),
    "it says yes or no of images, and its files are laid out for that": ("shieldgemma2",),
    "its images are read by a model of the library timm, which this program has not been tried with": ("fast_vlm", "perception_lm"),
    "its layers hand on several states, which learned weights mix (hyper-connections), where others have one": (
        "glm5_next_text",
        "hy_v4",
        "qwen4_exp_text",
    ),
    "its layers scale the residual stream itself by learned weights before they add to it": ("doge",),
    "its experts for text lie in one part with those for images, each with a router of its own": ("ernie4_5_vl_moe_text",),
    "its layers read, besides the state, how far the text may lag behind the sound": ("voxtral_realtime_text",),
    "its class makes the feed-forward part half as wide as its config says, and its layers keep their states in themselves": (
        "recurrent_gemma",
    ),
    "a projection, an activation and a norm lie between its last norm and its output head": ("modernbert-decoder",),
    "its feed-forward projections lie in the layer itself, and not in a part of it": ("biogpt",),
    "AutoModelForCausalLM of transformers has no class for its text model, and no family here has been found to compute the same": (
        "deepseek_ocr2_text",
        "mistral4",
        "molmo2_text",
        "step3p5",
        "unlimited_ocr_text",
    ),
    _NOT_TRIED: (
        *("axk2", "beam", "cosmos3_edge_text", "dots3_note_text", "emu3_text_model", "hrm_text", "inkling2_text", "inkling_text"),
        *("muse_glimmer_text", "muse_spark_text", "reformer", "zaya"),
    ),
}
UNSUPPORTED = {model_type: reason for reason, model_types in _REASONS.items() for model_type in model_types}

_HOLD = {  # model_type of a text model -> the models of text and more that hold one, where nothing else is said
    "aria_text": ("aria",),
    "cohere2": ("aya_vision", "cohere2_vision"),
    "cohere_compass_text": ("cohere_compass",),
    "cosmos3_edge_text": ("cosmos3_edge",),
    "deepseek_ocr2_text": ("deepseek_ocr2",),
    "deepseek_v3": ("kimi_k25",),
    "diffusion_gemma_text": ("diffusion_gemma",),
    "dots3_note_text": ("dots3_note",),
    "emu3_text_model": ("emu3",),
    "ernie4_5_vl_moe_text": ("ernie4_5_vl_moe",),
    "exaone4": ("exaone4_5",),
    "gemma": ("paligemma",),
    "gemma3_text": ("gemma3",),
    "gemma3n_text": ("gemma3n",),
    "gemma4_text": ("gemma4",),
    "gemma4_unified_text": ("gemma4_unified",),
    "glm4v_moe_text": ("glm4v_moe",),
    "glm4v_text": ("glm46v", "glm4v", "glmga"),
    "glm5_next_text": ("glm5_next",),
    "glm_ocr_text": ("glm_ocr",),
    "granite": ("granite_speech", "granite_speech_plus"),
    "granite4_vision_text": ("granite4_vision",),
    "granite_docling_text": ("granite_docling",),
    "hunyuan_vl_text": ("hunyuan_vl",),
    "hyperclovax": ("hyperclovax_vision_v2",),
    "inkling2_text": ("inkling2",),
    "inkling_text": ("inkling_mm_model",),
    "lfm2": ("lfm2_vl",),
    "lfm3": ("lfm3_vl",),
    "llama": (
        *("deepseek_vl", "deepseek_vl_hybrid", "glmasr", "idefics3", "janus", "llava", "llava_next", "llava_next_video", "smolvlm"),
        *("video_llava", "vipllava", "voxtral"),
    ),
    "llama4_text": ("llama4",),
    "minimax_m3_vl_text": ("minimax_m3_vl",),
    "mistral": ("idefics2", "mistral3"),
    "mistral_large4_text": ("mistral_large4",),
    "molmo2_text": ("molmo2",),
    "muse_glimmer_text": ("muse_glimmer",),
    "muse_spark_text": ("muse_spark",),
    "nemotron_h": ("nemotron_h_omni",),
    "opt": ("blip-2", "instructblip", "instructblipvideo"),
    "paddleocr_vl_text": ("paddleocr_vl",),
    "persimmon": ("fuyu",),
    "qwen2": (*("got_ocr2", "internvl", "llava_onevision", "ovis2", "pp_chart2table", "qwen2_audio", "vibevoice_asr", "video_llama_3"),),
    "qwen2_5_omni_text": ("qwen2_5_omni_thinker",),
    "qwen2_5_vl_text": ("qwen2_5_vl",),
    "qwen2_vl_text": ("qwen2_vl",),
    "qwen3": ("fun_asr_nano", "lighton_ocr", "moss_transcribe_diarize", "qianfan_ocr", "qwen3_asr"),
    "qwen3_5_moe_text": ("qwen3_5_moe",),
    "qwen3_5_text": ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "qwen3_5"),
    "qwen3_omni_moe_text": ("qwen3_omni_moe_thinker",),
    "qwen3_vl_moe_text": ("qwen3_vl_moe",),
    "qwen3_vl_text": ("cosmos3_omni", "qwen3_vl"),
    "qwen4_exp_text": ("qwen4_exp",),
    "step3p5": ("step3p7",),
    "unlimited_ocr_text": ("unlimited_ocr",),
    "voxtral_realtime_text": ("voxtral_realtime",),
}
WRAPPERS = {wrapper: text for text, wrappers in _HOLD.items() for wrapper in wrappers}  # model_type -> that of its text model
