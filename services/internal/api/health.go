package api

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Health knows whether a process should get traffic. The zero value is ready.
type Health struct {
	mu       sync.Mutex
	checks   []check
	draining bool
}

type check struct {
	name string
	// optional checks are shown and do not make the process unready.
	optional bool
	run      func(context.Context) error
}

// checkTimeout is how long all checks together may take.
const checkTimeout = 3 * time.Second

// Add adds a check without which the process is not ready.
func (h *Health) Add(name string, run func(context.Context) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.checks = append(h.checks, check{name: name, run: run})
}

// AddOptional adds a check that is only shown: the process serves without it.
func (h *Health) AddOptional(name string, run func(context.Context) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.checks = append(h.checks, check{name: name, optional: true, run: run})
}

// Drain makes the process unready, before it stops.
func (h *Health) Drain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.draining = true
}

// Report is the body of /-/ready.
type Report struct {
	// Status is "ready", "not ready" or "draining".
	Status string            `json:"status"`
	Checks map[string]Result `json:"checks"`
}

// Result is that of one check.
type Result struct {
	OK       bool   `json:"ok"`
	Optional bool   `json:"optional,omitempty"`
	Error    string `json:"error,omitempty"`
}

// Report runs the checks, side by side.
func (h *Health) Report(ctx context.Context) Report {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	h.mu.Lock()
	checks, draining := h.checks, h.draining
	h.mu.Unlock()
	report := Report{Status: "ready", Checks: map[string]Result{}}
	results := make([]error, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() { results[i] = c.run(ctx) })
	}
	wg.Wait()
	for i, c := range checks {
		result := Result{OK: results[i] == nil, Optional: c.optional}
		if results[i] != nil {
			result.Error = results[i].Error()
			if !c.optional {
				report.Status = "not ready"
			}
		}
		report.Checks[c.name] = result
	}
	if draining {
		report.Status = "draining"
	}
	return report
}

// Operate serves /-/healthy, /-/ready and /metrics on a mux.
func Operate(mux *http.ServeMux, h *Health, metrics prometheus.Gatherer) {
	mux.HandleFunc("GET /-/healthy", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"status": "healthy"})
	})
	mux.HandleFunc("GET /-/ready", func(w http.ResponseWriter, r *http.Request) {
		report, status := h.Report(r.Context()), http.StatusOK
		if report.Status != "ready" {
			status = http.StatusServiceUnavailable
		}
		writeJSON(w, status, report)
	})
	if metrics != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
