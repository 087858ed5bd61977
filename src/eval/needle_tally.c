#include <math.h>

#include "eval/needle.h"

json_t *needle_said_json(const needle_said *s)
{
    return json_pack("{s:b, s:b, s:o, s:o, s:I}", "correct", s->correct, "cited", s->cited, "kld", record_numbers(s->kld, s->n_kld), "cost",
                     record_cost(&s->reading.cost), "tokens", (json_int_t)s->reading.tokens);
}

static quarry_code fail_record(quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_FORMAT, "a record of the journal is not one of eval needle; remove the journal");
}

quarry_code needle_tally_add(needle_tally *tallies, int n_policies, const json_t *policies, needle_cell *cells, int64_t stride,
                             quarry_error *error)
{
    int full_correct = 0;
    if (json_array_size(policies) != (size_t)n_policies) return fail_record(error);
    for (int p = 0; p < n_policies; p++) {
        needle_tally *t = &tallies[p];
        json_t *kld, *cost;
        json_int_t tokens;
        int correct, cited;
        size_t i;
        json_t *value;
        if (json_unpack(json_array_get(policies, (size_t)p), "{s:b, s:b, s:o, s:o, s:I}", "correct", &correct, "cited", &cited, "kld", &kld,
                        "cost", &cost, "tokens", &tokens) ||
            !json_is_array(kld) || !reading_add_record(&t->reading, cost, tokens))
            return fail_record(error);
        if (p == 0) full_correct = correct;
        json_array_foreach(kld, i, value)
        {
            const quarry_code code = series_push(&t->kld, json_number_value(value), error);
            if (code != QUARRY_OK) return code;
        }
        t->asked++;
        t->full_correct += full_correct;
        t->correct += correct;
        t->kept += correct && full_correct;
        t->cited += cited;
        if (!cells) continue;
        cells[p * stride].asked++;
        cells[p * stride].correct += correct;
    }
    return QUARRY_OK;
}

/* Differences of one question are 1 (lost), -1 (gained) or 0. */
static void loss_fill(needle_result *out)
{
    const double n = (double)out->asked, lost = (double)(out->full_correct - out->kept), gained = (double)(out->correct - out->kept);
    out->loss = n > 0 ? (lost - gained) / n : 0;
    const double sd = n > 1 ? sqrt(fmax(0, (lost + gained - n * out->loss * out->loss) / (n - 1))) : 0;
    metric_loss_interval(out->asked, out->loss, sd, &out->loss_low, &out->loss_high);
}

void needle_tally_finish(needle_tally *t, const needle_tally *full, const quarry_model *model, needle_result *out)
{
    out->asked = t->asked;
    out->full_correct = t->full_correct;
    out->correct = t->correct;
    out->kept = t->kept;
    out->cited = t->cited;
    metric_wilson(t->kept, t->full_correct, 1.96, &out->kept_low, &out->kept_high);
    metric_wilson(t->cited, t->correct, 1.96, &out->cited_low, &out->cited_high);
    loss_fill(out);
    series_summarise(&t->kld, &out->kld);
    reading_relate(&t->reading, &full->reading, model, &out->reading);
}
