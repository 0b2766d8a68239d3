package detector

import "sync"

// budgets are the alert budgets that keys and organizations have set, in false
// alerts per key and month.
type budgets struct {
	mu   sync.RWMutex
	keys map[string]float64
	orgs map[string]float64
}

func newBudgets() *budgets { return &budgets{keys: map[string]float64{}, orgs: map[string]float64{}} }

// of is the budget of a key: its own, else its organization's, else 0.
func (b *budgets) of(orgID, keyID string) float64 {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if own := b.keys[keyID]; own > 0 {
		return own
	}
	return b.orgs[orgID]
}

func (b *budgets) setKey(id string, budget float64) (changed bool) { return b.set(b.keys, id, budget) }

func (b *budgets) setOrg(id string, budget float64) (changed bool) { return b.set(b.orgs, id, budget) }

func (b *budgets) set(of map[string]float64, id string, budget float64) (changed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if of[id] == budget {
		return false
	}
	if of[id] = budget; budget == 0 {
		delete(of, id)
	}
	return true
}
