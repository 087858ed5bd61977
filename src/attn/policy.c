#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn/attn.h"
#include "attn/pass.h"
#include "attn/policies.h"

const attn_policy_type *const attn_policies[] = {&attn_ivfpq,   &attn_full,    &attn_window, &attn_oracle,   &attn_quest,
                                                 &attn_meanstd, &attn_pqcache, &attn_snapkv, &attn_magicpig, &attn_clusters,
                                                 &attn_a2ats,   &attn_rekv,    NULL};

static quarry_code unknown_policy(const char *name, size_t n, quarry_error *error)
{
    char known[256] = "";
    for (int i = 0; attn_policies[i]; i++) {
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", attn_policies[i]->name);
    }
    return error_set(error, QUARRY_ERROR_ARGUMENT, "unknown retrieval policy '%.*s'; known are %s", (int)n, name, known);
}

attn_policy *attn_policy_create(const char *spec, const attn_shape *shape, const math_kernels *kernels, quarry_error *error)
{
    size_t n = strcspn(spec, ":");
    for (int i = 0; attn_policies[i]; i++) {
        const attn_policy_type *type = attn_policies[i];
        if (strlen(type->name) != n || memcmp(type->name, spec, n) != 0) continue;
        return type->create(shape, kernels, spec[n] ? spec + n + 1 : "", error);
    }
    unknown_policy(spec, n, error);
    return NULL;
}

void attn_policy_destroy(attn_policy *p)
{
    if (p) p->type->destroy(p);
}

size_t attn_policy_bytes(const attn_policy *p)
{
    attn_memory memory = {.index.held_only = true, .codebooks.held_only = true};
    p->type->tally(p, &memory);
    return memory.index.held + memory.codebooks.held;
}

size_t attn_policy_scratch(const attn_policy *p, int64_t n_far)
{
    const size_t d = (size_t)p->shape.kv.head_dim, group = (size_t)(p->shape.n_head / p->shape.kv.n_head_kv),
                 n = n_far > 0 ? (size_t)n_far : 0;
    const size_t tile = attention_tile_scratch(TILE_VECTORS, (int)d) + 4 * TILE_VECTORS * d * sizeof(float);
    const size_t select = p->type->select ? n * (4 * group + 10) : 0; /* a score for every token and head, places of some */
    const size_t index = p->type->scratch ? p->type->scratch(p, n_far) : 0;
    return tile + (select > index ? select : index);
}

static quarry_code set_option(const char *policy, const char *key, size_t n_key, const char *value, size_t n_value,
                              const attn_option *options, int n_options, quarry_error *error)
{
    char number[64], *end;
    for (int i = 0; i < n_options; i++) {
        if (strlen(options[i].key) != n_key || memcmp(options[i].key, key, n_key) != 0) continue;
        if (options[i].min == 0 && options[i].max == 0) {
            if (n_value == 0 || n_value >= ATTN_OPTION_TEXT)
                return error_set(error, QUARRY_ERROR_ARGUMENT, "policy %s: %s must be a text of 1 to %d bytes", policy, options[i].key,
                                 ATTN_OPTION_TEXT - 1);
            char *text = memcpy(options[i].value, value, n_value);
            text[n_value] = '\0';
            return QUARRY_OK;
        }
        snprintf(number, sizeof number, "%.*s", (int)n_value, value);
        errno = 0;
        double x = strtod(number, &end);
        if (n_value == 0 || n_value >= sizeof number || *end || errno || !(x >= options[i].min && x <= options[i].max))
            return error_set(error, QUARRY_ERROR_ARGUMENT, "policy %s: %s must be a number from %g to %g, not '%.*s'", policy,
                             options[i].key, options[i].min, options[i].max, (int)n_value, value);
        *(double *)options[i].value = x;
        return QUARRY_OK;
    }
    char known[256] = "";
    for (int i = 0; i < n_options; i++) {
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", options[i].key);
    }
    return error_set(error, QUARRY_ERROR_ARGUMENT, "policy %s has no option '%.*s'; %s%s", policy, (int)n_key, key,
                     n_options ? "it has " : "it has no options", known);
}

quarry_code attn_options_parse(const char *policy, const char *spec, const attn_option *options, int n_options, quarry_error *error)
{
    while (*spec) {
        size_t n = strcspn(spec, ","), n_key = strcspn(spec, "=,");
        if (n_key == n)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "policy %s: option '%.*s' needs a value (key=value)", policy, (int)n, spec);
        quarry_code code = set_option(policy, spec, n_key, spec + n_key + 1, n - n_key - 1, options, n_options, error);
        if (code != QUARRY_OK) return code;
        spec += n + (spec[n] == ',');
    }
    return QUARRY_OK;
}
