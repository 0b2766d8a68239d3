package run

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// StopTimeout is how long [Group.Stop] waits for one part before it goes on
// without it.
const StopTimeout = 4 * time.Second

// Group is what one process runs. Its parts are stopped last in, first out,
// one after the other, so that what feeds others is added after them.
type Group struct {
	mu     sync.Mutex
	parts  []part
	failed chan error
	once   sync.Once
}

type part struct {
	name string
	stop func() error
}

// NewGroup is an empty group.
func NewGroup() *Group { return &Group{failed: make(chan error, 1)} }

// Go runs fn until it is stopped; if fn returns before that, [Group.Wait] ends.
func (g *Group) Go(name string, fn func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		err := fn(ctx)
		if ctx.Err() == nil {
			if err == nil {
				err = errors.New("ended by itself")
			}
			g.fail(fmt.Errorf("%s: %w", name, err))
			err = nil // told once
		}
		done <- err
	}()
	g.OnStop(name, func() error {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
}

// OnStop registers the clean-up of a thing right after it was acquired.
func (g *Group) OnStop(name string, fn func() error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.parts = append(g.parts, part{name, fn})
}

func (g *Group) fail(err error) {
	select {
	case g.failed <- err:
	default:
	}
}

// Wait returns when ctx is done, or with the error of the first part that ended
// by itself. It stops nothing.
func (g *Group) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-g.failed:
		return err
	}
}

// Run is [Group.Wait] and then [Group.Stop], with the errors of both.
func (g *Group) Run(ctx context.Context) error {
	err := g.Wait(ctx)
	return errors.Join(err, g.Stop())
}

// Stop stops every part in reverse order and returns what went wrong. It may be
// called twice.
func (g *Group) Stop() (err error) {
	g.once.Do(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		for i := len(g.parts) - 1; i >= 0; i-- {
			err = errors.Join(err, g.parts[i].stopWithin(StopTimeout))
		}
	})
	return err
}

func (p part) stopWithin(limit time.Duration) error {
	done := make(chan error, 1)
	go func() { done <- p.stop() }()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("stop %s: %w", p.name, err)
		}
		return nil
	case <-time.After(limit):
		return fmt.Errorf("stop %s: not done after %s", p.name, limit)
	}
}
