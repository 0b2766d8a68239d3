package notifier

import (
	"fmt"
	"time"

	"github.com/latchkey-dev/latchkey/schemas/alert"
	"github.com/latchkey-dev/latchkey/schemas/key"
)

// mailed reports whether a notice is worth a mail: what asks the owner to act,
// and what a policy did without him. What a person did by hand goes to webhooks
// and the audit alone.
func mailed(n *key.Notice) bool {
	switch n.Type {
	case key.Expired:
		// The end of a grace period was announced when the key was rotated.
		return n.Data.SuccessorID == ""
	case key.Expiring, key.RotationDue, key.Unused:
		return true
	case key.Rotated, key.SuspendEv, key.RevokedEv:
		return n.Data.Actor == "system"
	}
	return false
}

// noticeWords are the headline, the explanation and the severity's class.
func noticeWords(n *key.Notice, name string) (headline, summary, class string) {
	date := func(t *time.Time) string {
		if t == nil {
			return "an unknown date"
		}
		return t.UTC().Format("Mon 2 Jan 2006, 15:04 MST")
	}
	switch n.Type {
	case key.Expiring:
		return name + " will expire soon", "The key expires on " + date(n.Data.ExpiresAt) + ". What uses it will be refused from then on, unless the key is replaced before.", alert.Medium
	case key.Expired:
		return name + " has expired", "The key expired on " + date(n.Data.ExpiresAt) + ". Requests with it are refused.", alert.High
	case key.RotationDue:
		return name + " is due for rotation", "The key is older than its rotation interval; it was due on " + date(n.Data.RotationDueAt) + ". It goes on working.", alert.Low
	case key.Unused:
		if n.Data.LastUsedAt == nil {
			return name + " was never used", "Nobody has used this key since it was created. A key that nobody uses is a key that nobody misses when it is stolen.", alert.Low
		}
		return name + " is not used any more", "The key was last used on " + date(n.Data.LastUsedAt) + ". A key that nobody uses is a key that nobody misses when it is stolen.", alert.Low
	case key.Rotated:
		text := "A policy replaced the key; its successor is " + ident(n.Data.SuccessorID) + "."
		if n.Data.ExpiresAt != nil {
			text += " The old secret works until " + date(n.Data.ExpiresAt) + "."
		}
		return name + " was rotated automatically", withReason(text, n), alert.Medium
	case key.SuspendEv:
		return name + " was suspended automatically", withReason("A policy suspended the key; requests with it are refused until you resume it.", n), alert.High
	case key.RevokedEv:
		return name + " was revoked automatically", withReason("A policy revoked the key; requests with it are refused.", n), alert.High
	}
	return name + ": " + n.Type, "", alert.Low
}

func withReason(text string, n *key.Notice) string {
	if n.Data.Reason != "" {
		text += " Reason: " + clean(n.Data.Reason, 200) + "."
	}
	return text
}

func noticeSteps(n *key.Notice, k keyView) []step {
	rotate := step{Title: "Replace it", Text: "The new secret is shown once; the old one stays valid for a day, so that nothing breaks:", Command: "latchkey key rotate " + k.ID + " --grace 24h"}
	revoke := step{Title: "Or take it out of service", Text: "If nobody needs it:", Command: "latchkey key revoke " + k.ID}
	switch n.Type {
	case key.Expired:
		return []step{{Title: "Replace it", Text: "If something still needs it, create a key in its place on the key’s page or with the command line."}}
	case key.Unused:
		revoke.Title = "Take it out of service"
		return []step{revoke}
	case key.Rotated:
		if n.Data.Unclaimed {
			return []step{{Title: "Fetch the new secret", Text: "Nobody has seen it yet; it is shown once. The key’s page says how."}}
		}
		return []step{{Title: "Nothing, if all is well", Text: "See on the key’s page that the successor is in use before the old one ends."}}
	case key.SuspendEv:
		return []step{{Title: "Look first", Text: "See on the key’s page what it did. Resume it if that was you."}, rotate}
	case key.RevokedEv:
		return []step{{Title: "Look", Text: "See on the key’s page what it did, and find out where its secret leaked."}}
	}
	return []step{rotate, revoke}
}

// noticeLetter makes the mail of a notice.
func (r *renderer) noticeLetter(n *key.Notice, org *key.Org, rec *key.Record, to string, created time.Time) (*letter, error) {
	k := viewKey(n.KeyID, rec, created)
	if rec == nil {
		k.Name, k.Masked = clean(n.Data.Name, 80), masked(n.Data.Prefix)
	}
	v := &mailView{Key: k, URL: r.page("keys", n.KeyID), URLLabel: "See the key", CheckID: k.ID, Steps: noticeSteps(n, k), Badge: "Notice"}
	v.Headline, v.Summary, v.Severity = noticeWords(n, k.Name)
	v.Preheader = v.Summary
	v.Subject = headerText(v.Headline)
	if k.Masked != "" {
		v.Subject = headerText(fmt.Sprintf("%s (%s)", v.Headline, k.Masked))
	}
	v.Facts = []row{{"Key", k.Name}}
	if k.Masked != "" {
		v.Facts = append(v.Facts, row{"Begins with", k.Masked})
	}
	v.Facts = append(v.Facts, row{"Key ID", k.ID})
	if k.Scopes != "" {
		v.Facts = append(v.Facts, row{"Scopes", k.Scopes})
	}
	if n.Data.LastUsedAt != nil {
		v.Facts = append(v.Facts, row{"Last used", clock(n.Data.LastUsedAt.UTC())})
	}
	r.address(v, org, to)
	return r.letter("notice", v, &letter{
		To: to, MessageID: r.mailer.messageID(n.ID), Date: created,
		Headers: map[string]string{"X-Latchkey-Notice": n.Type, "X-Latchkey-Key-Id": n.KeyID, "X-Latchkey-Org-Id": n.OrgID},
	})
}

// digestLine is one held-back alert.
type digestLine struct {
	ID, Text, When, URL string
}

// digestLetter makes the one mail that stands for many.
func (r *renderer) digestLetter(d *digest, to string, created time.Time) (*letter, error) {
	total := len(d.Lines) + d.More
	v := &mailView{
		Severity: alert.High, Badge: "Many alerts", Headline: fmt.Sprintf("%d more alerts in the last hour", total),
		Summary: fmt.Sprintf("You have had %d mails within an hour, which is the most that Latchkey sends to one address. These alerts came beyond that; each is in the console with its evidence.", d.Sent),
		More:    d.More, URL: r.page("alerts"), URLLabel: "See all alerts", ConsoleURL: r.consoleURL, To: to,
		Why: "you are the owner of the keys that these alerts are about",
	}
	v.Subject, v.Preheader = headerText("High: "+v.Headline), v.Summary
	for _, l := range d.Lines {
		v.Lines = append(v.Lines, digestLine{ID: ident(l.ID), Text: clean(l.Subject, 200), When: clock(l.Time.UTC()), URL: r.page("alerts", l.ID)})
	}
	return r.letter("digest", v, &letter{To: to, MessageID: r.mailer.messageID(d.ID), Date: created, Urgent: true})
}
