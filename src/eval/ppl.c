#include "eval/eval.h"

quarry_code ppl_windows(kld_params *params, int64_t window, int64_t n_scored, int samples, quarry_error *error)
{
    int64_t n_windows = 0;
    const int64_t n = n_scored > 0 ? n_scored : window - window / 2 - 1; /* the window's last token has no successor in it to score */
    if (n < 1 || n > window - 2)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "%lld scored tokens do not fit a window of %lld, whose first two cannot be",
                         (long long)n, (long long)window);
    for (int i = 0; i < params->n_texts; i++) {
        if (params->texts[i].n_tokens < window)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: has %lld tokens, fewer than a window of %lld", params->texts[i].name,
                             (long long)params->texts[i].n_tokens, (long long)window);
        n_windows += params->texts[i].n_tokens / window;
    }
    if (samples == 0 && n_windows > INT32_MAX)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "%lld windows are too many", (long long)n_windows);
    params->depth = window - 1 - n;
    params->n_steps = n;
    params->samples = samples > 0 ? samples : (int)n_windows;
    params->consecutive = samples == 0;
    return QUARRY_OK;
}
