package api

import (
	_ "embed"
	"html/template"
	"net/http"
	"slices"
	"sort"
	"strings"

	"github.com/danielgtaylor/huma/v2"
)

// The pages are made here and load nothing from elsewhere, so that they work on
// a machine without the internet.
var (
	//go:embed docs.html
	docsHTML string
	pages    = template.Must(template.New("docs").Parse(docsHTML))
)

type docOperation struct {
	Method, Path, ID, Summary, Description, Scope string
	Parameters                                    []*huma.Param
	Body                                          []docField
	Answer                                        []docField
	Status                                        string
}

type docField struct {
	Name, Type, Doc string
	Required        bool
}

type docGroup struct {
	Name       string
	Operations []docOperation
}

func (s *Server) docsPage(w http.ResponseWriter, _ *http.Request) {
	spec := s.API.OpenAPI()
	groups := map[string][]docOperation{}
	for path, item := range spec.Paths {
		for method, op := range map[string]*huma.Operation{
			"GET": item.Get, "POST": item.Post, "PUT": item.Put, "PATCH": item.Patch, "DELETE": item.Delete,
		} {
			if op == nil {
				continue
			}
			tag := "Other"
			if len(op.Tags) > 0 {
				tag = op.Tags[0]
			}
			groups[tag] = append(groups[tag], describe(spec, method, path, op))
		}
	}
	var out []docGroup
	for name, ops := range groups {
		sort.Slice(ops, func(i, j int) bool {
			if ops[i].Path != ops[j].Path {
				return ops[i].Path < ops[j].Path
			}
			return ops[i].Method < ops[j].Method
		})
		out = append(out, docGroup{Name: name, Operations: ops})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	page(w, "docs", map[string]any{"Info": spec.Info, "Groups": out, "Problems": sortedKinds()})
}

func describe(spec *huma.OpenAPI, method, path string, op *huma.Operation) docOperation {
	d := docOperation{
		Method: method, Path: path, ID: op.OperationID, Summary: op.Summary, Description: op.Description,
		Scope: scopeOf(op), Parameters: op.Parameters,
	}
	if op.RequestBody != nil && op.RequestBody.Content["application/json"] != nil {
		d.Body = fields(spec, op.RequestBody.Content["application/json"].Schema)
	}
	for _, status := range []string{"200", "201", "202", "204"} {
		if r := op.Responses[status]; r != nil {
			d.Status = status
			if r.Content["application/json"] != nil {
				d.Answer = fields(spec, r.Content["application/json"].Schema)
			}
		}
	}
	return d
}

func fields(spec *huma.OpenAPI, schema *huma.Schema) []docField {
	schema = resolve(spec, schema)
	if schema == nil {
		return nil
	}
	var out []docField
	for name, property := range schema.Properties {
		out = append(out, docField{
			Name: name, Type: typeName(property), Doc: property.Description, Required: slices.Contains(schema.Required, name),
		})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

func resolve(spec *huma.OpenAPI, schema *huma.Schema) *huma.Schema {
	if schema != nil && schema.Ref != "" {
		return spec.Components.Schemas.SchemaFromRef(schema.Ref)
	}
	return schema
}

func typeName(schema *huma.Schema) string {
	if schema.Ref != "" {
		return schema.Ref[strings.LastIndexByte(schema.Ref, '/')+1:]
	}
	switch {
	case schema.Type == "array" && schema.Items != nil:
		return "[" + typeName(schema.Items) + "]"
	case schema.Format != "":
		return schema.Format
	}
	return schema.Type
}

func problemPage(w http.ResponseWriter, r *http.Request) {
	k, ok := kinds[r.PathValue("slug")]
	if !ok {
		NotFound.New("There is no problem of this name; /docs lists them.").Write(w, r)
		return
	}
	page(w, "problem", docProblem(k))
}

// Problem pages read these.
type docKind struct {
	Path, Title, Explain string
	Status               int
}

func docProblem(k *Kind) docKind {
	title := k.title
	if title == "" {
		title = "Another error"
	}
	return docKind{Path: problemPath + k.slug, Title: title, Explain: k.explain, Status: k.status}
}

func sortedKinds() []docKind {
	var out []docKind
	for _, k := range kinds {
		out = append(out, docProblem(k))
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Path < out[j].Path })
	return out
}

func page(w http.ResponseWriter, name string, data any) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	_ = pages.ExecuteTemplate(w, name, data)
}
