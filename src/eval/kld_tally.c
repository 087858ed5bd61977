#include <math.h>

#include "eval/kld.h"

const char *const kld_task_names[KLD_TASKS] = {"prose", "needle"};

json_t *kld_steps_json(const kld_steps *s)
{
    return json_pack("{s:o, s:o, s:I, s:b, s:o, s:[f,I,f,I]}", "kld", record_numbers(s->kld, s->n), "nll", record_numbers(s->nll, s->n),
                     "agreed", (json_int_t)s->agreed, "correct", s->correct, "cost", record_cost(&s->cost), "audit", s->audit.mass,
                     (json_int_t)s->audit.n_mass, s->audit.recall, (json_int_t)s->audit.n_recall);
}

static quarry_code fail_record(quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_FORMAT, "a record of the journal is not one of this measurement; remove the journal");
}

/* policy and full: two members of one record. */
static quarry_code tally_policy(kld_tally *t, const json_t *policy, const json_t *full, quarry_error *error)
{
    json_t *kld, *nll, *full_nll, *cost;
    json_int_t agreed, n_mass, n_recall;
    double mass, recall, kld_sum = 0, nll_sum = 0, dnll_sum = 0;
    int correct, full_correct;
    quarry_code code;
    if (json_unpack((json_t *)policy, "{s:o, s:o, s:I, s:b, s:o, s:[F,I,F,I]}", "kld", &kld, "nll", &nll, "agreed", &agreed, "correct",
                    &correct, "cost", &cost, "audit", &mass, &n_mass, &recall, &n_recall) ||
        json_unpack((json_t *)full, "{s:o, s:b}", "nll", &full_nll, "correct", &full_correct))
        return fail_record(error);
    const size_t n = json_array_size(kld);
    if (n == 0 || json_array_size(nll) != n || json_array_size(full_nll) != n) return fail_record(error);
    for (size_t i = 0; i < n; i++) {
        const double here = json_number_value(json_array_get(kld, i)), own = json_number_value(json_array_get(nll, i));
        const double delta = own - json_number_value(json_array_get(full_nll, i));
        if ((code = series_push(&t->kld, here, error)) != QUARRY_OK || (code = series_push(&t->nll, own, error)) != QUARRY_OK ||
            (code = series_push(&t->dnll, delta, error)) != QUARRY_OK)
            return code;
        kld_sum += here;
        nll_sum += own;
        dnll_sum += delta;
    }
    if ((code = series_push(&t->kld_means, kld_sum / (double)n, error)) != QUARRY_OK ||
        (code = series_push(&t->nll_means, nll_sum / (double)n, error)) != QUARRY_OK ||
        (code = series_push(&t->dnll_means, dnll_sum / (double)n, error)) != QUARRY_OK)
        return code;
    if (!reading_add_record(&t->reading, cost, (int64_t)n)) return fail_record(error);
    t->steps += (int64_t)n;
    t->agreed += agreed;
    t->samples++;
    t->full_correct += full_correct;
    t->correct += correct;
    t->kept += correct && full_correct;
    t->audit = (audit_sums){t->audit.mass + mass, t->audit.recall + recall, t->audit.n_mass + n_mass, t->audit.n_recall + n_recall};
    return QUARRY_OK;
}

quarry_code kld_tally_add(kld_tally *tallies, int n_policies, const json_t *policies, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    if (json_array_size(policies) != (size_t)n_policies) return fail_record(error);
    for (int i = 0; i < n_policies && code == QUARRY_OK; i++)
        code = tally_policy(&tallies[i], json_array_get(policies, (size_t)i), json_array_get(policies, 0), error);
    return code;
}

static void summarise(series *steps, series *means, kld_summary *out)
{
    metric_summary by_sample;
    series_summarise(steps, &out->steps);
    series_summarise(means, &by_sample);
    out->clustered_error = by_sample.n >= KLD_CLUSTERS ? by_sample.standard_error : NAN;
}

void kld_tally_finish(kld_tally *t, const kld_tally *full, const quarry_model *model, kld_result *out)
{
    out->n_samples = t->samples;
    summarise(&t->kld, &t->kld_means, &out->kld);
    summarise(&t->nll, &t->nll_means, &out->nll);
    summarise(&t->dnll, &t->dnll_means, &out->dnll);
    out->agreement = (double)t->agreed / (double)t->steps;
    out->perplexity = exp(out->nll.steps.mean);
    out->mass = t->audit.n_mass ? t->audit.mass / (double)t->audit.n_mass : NAN;
    out->recall = t->audit.n_recall ? t->audit.recall / (double)t->audit.n_recall : NAN;
    out->full_correct = t->full_correct;
    out->correct = t->correct;
    out->kept = t->kept;
    metric_wilson(t->kept, t->full_correct, 1.96, &out->kept_low, &out->kept_high);
    reading_relate(&t->reading, &full->reading, model, &out->reading);
}

void kld_tally_free(kld_tally *t)
{
    series_free(&t->kld);
    series_free(&t->dnll);
    series_free(&t->nll);
    series_free(&t->kld_means);
    series_free(&t->nll_means);
    series_free(&t->dnll_means);
}
